"""Evaluation: distances against closed forms and brute force, the classifier, and a whole report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.evaluation.toys import CPU, NAMES, OPTIONS, TRAINING, toy_checkpoint, toy_images
from tests.model.latent.folders import save_latent_pipeline
from tests.tools import needs
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierError,
    load_classifier,
    load_or_train_classifier,
    save_classifier,
    train_classifier,
)
from tminus.model.evaluation.distances import Gaussian, fit_gaussian, frechet_distance, nearest_distances
from tminus.model.evaluation.evaluate import evaluate, measure_bound
from tminus.model.evaluation.figures import Bound, LeftOut
from tminus.model.evaluation.judge import Judge
from tminus.model.evaluation.page import render
from tminus.model.evaluation.report import Report
from tminus.model.evaluation.samples import EvaluateError, EvaluateOptions, balanced_picks, draw_samples
from tminus.model.guidance import Forward
from tminus.model.loss import variational_bound
from tminus.model.pixels import to_model_range
from tminus.model.training.data import ImageSet, load_fashion_mnist

pytestmark = pytest.mark.slow

STORED_CLASSIFIER = Path(__file__).parents[3] / "checkpoints" / "fashion-mnist-classifier"

# --- distances ---------------------------------------------------------------------------------------------------
TEST = toy_images(60, 1)


def random_gaussian(seed: int, dim: int = 12) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(dim, generator=generator, dtype=torch.float64), a @ a.T)


def test_frechet_distance_of_covariances_that_do_not_commute_is_the_nonsymmetric_root_s() -> None:
    one, other = random_gaussian(1), random_gaussian(2)
    # tr (S1 S2)^1/2, whose eigenvalues are positive though the product is not symmetric.
    cross = torch.linalg.eigvals(one.covariance @ other.covariance).real.sqrt().sum()
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace() - 2 * cross
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)


def test_frechet_distance_takes_fewer_images_than_features() -> None:
    features = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))
    few, many = fit_gaussian(features), random_gaussian(8)
    assert np.isfinite(frechet_distance(few, many))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-7)


def test_weighted_gaussian_is_numpys_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(9)
    features, weights = torch.randn(40, 6, generator=generator), torch.rand(40, generator=generator).double()
    mean, covariance = fit_gaussian(features, weights)
    values = features.double().numpy()
    np.testing.assert_allclose(mean, np.average(values, 0, weights.numpy()))
    np.testing.assert_allclose(covariance, np.cov(values, rowvar=False, aweights=weights.numpy()))
    mean, covariance = fit_gaussian(features)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(covariance, np.cov(values, rowvar=False))


@pytest.mark.parametrize("bounds", [{"REFERENCES_AT_ONCE": 16, "QUERIES_AT_ONCE": 7}, {"VALUES_AT_ONCE": 192 * 3}])
def test_nearest_distances_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int]) -> None:
    for name, bound in bounds.items():  # so that chunks of both kinds meet
        monkeypatch.setattr(f"tminus.model.evaluation.distances.{name}", bound)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    references = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    a, b = (x.numpy().reshape(len(x), -1) / 127.5 - 1 for x in (queries, references))
    rms = np.sqrt(((a[:, None] - b[None]) ** 2).mean(2))
    found = nearest_distances(queries, references)
    np.testing.assert_allclose(found, rms.min(1))


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor takes that an operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.num_bytes = max(self.num_bytes, value.numel() * value.element_size())
        return made


def test_nearest_distances_of_large_images_take_little_memory() -> None:
    """Four megabytes an image in float32: the forty at once would take 160 MiB, and in float64 320."""
    images = torch.randint(0, 256, (40, 1, 1024, 1024), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with Largest() as largest:
        assert nearest_distances(images[:30], images).max() == 0
    assert largest.num_bytes == 128 * 2**20  # 2**24 values in float64


# --- the classifier ----------------------------------------------------------------------------------------------


def test_classifier_training_is_a_function_of_its_seed(toy_classifier: Classifier) -> None:
    before = torch.get_rng_state()
    again, other = (
        train_classifier(toy_images(96, 0), toy_images(60, 1), dataclasses.replace(TRAINING, seed=seed), device=CPU)
        for seed in (0, 1)
    )
    assert again.weights_hash == toy_classifier.weights_hash
    assert other.weights_hash != toy_classifier.weights_hash
    assert torch.equal(torch.get_rng_state(), before)


def test_classifier_survives_being_saved_and_loaded(toy_classifier: Classifier, tmp_path: Path) -> None:
    save_classifier(tmp_path, toy_classifier)
    loaded = load_classifier(tmp_path, device=CPU)
    images = toy_images(9, 6).images
    assert torch.equal(loaded.read(images).features, toy_classifier.read(images).features)
    assert torch.equal(loaded.read(images).labels, toy_classifier.read(images).labels)
    for field in ("config", "class_names", "test_accuracy", "weights_hash", "trained_on"):
        assert getattr(loaded, field) == getattr(toy_classifier, field)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_classifier_is_trained_only_where_there_is_none(toy_classifier: Classifier, tmp_path: Path) -> None:
    save_classifier(tmp_path / "there", toy_classifier)
    train, test = toy_images(48, 7, channels=3), toy_images(30, 8, channels=3)
    same = dataclasses.replace(train, name=toy_classifier.trained_on["data"])
    assert load_or_train_classifier(tmp_path / "there", same, test, device=CPU).config.channels == 1
    with pytest.raises(ClassifierError, match=r"trained on .*, not on 'toy 7'"):
        load_or_train_classifier(tmp_path / "there", train, test, device=CPU)
    fresh = load_or_train_classifier(tmp_path / "new", train, test, device=CPU)
    assert fresh.config.channels == 3
    assert load_classifier(tmp_path / "new", device=CPU).weights_hash == fresh.weights_hash


def test_classifier_that_is_damaged_is_refused_with_its_file_named(toy_classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=r"config\.json"):
        load_classifier(tmp_path, device=CPU)
    save_classifier(tmp_path, toy_classifier)
    weights = tmp_path / "classifier.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClassifierError, match=r"classifier\.safetensors"):
        load_classifier(tmp_path, device=CPU)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "feature_dim": 7}))
    with pytest.raises(ClassifierError, match=r"classifier\.safetensors"):
        load_classifier(tmp_path, device=CPU)


def test_classifier_refuses_data_without_classes_and_sizes_it_cannot_pool() -> None:
    unlabelled = toy_images(8, 0, labelled=False)
    with pytest.raises(ClassifierError, match="no classes"):
        train_classifier(unlabelled, unlabelled, TRAINING, device=CPU)
    one_class = dataclasses.replace(toy_images(8, 0), labels=torch.zeros(8, dtype=torch.int64), class_names=("bright",))
    with pytest.raises(ClassifierError, match="needs two classes or more, and these images have one"):
        train_classifier(one_class, one_class, TRAINING, device=CPU)
    with pytest.raises(ValueError, match=r"sides of 8 or more, got \(28, 7\)"):
        ClassifierConfig(channels=1, size_px=(28, 7), num_classes=10)


@pytest.mark.long
def test_stored_classifier_reads_fashion_mnists_test_images() -> None:
    needs("dataset-fashion-mnist")
    test = load_fashion_mnist("test")
    classifier = load_classifier(STORED_CLASSIFIER, device=CPU)
    accuracy = (classifier.read(test.images).labels == test.labels).double().mean().item()
    assert accuracy >= 0.90
    assert accuracy == pytest.approx(classifier.test_accuracy, abs=0.002)  # another CPU rounds otherwise
    assert classifier.class_names == test.class_names
    assert sum(file.stat().st_size for file in STORED_CLASSIFIER.iterdir()) < 1_000_000


# --- the whole report --------------------------------------------------------------------------------------------


def report_on(checkpoint: Checkpoint, classifier: Classifier | None, labelled: bool = True) -> Report:
    train, test = toy_images(96, 0, labelled=labelled), toy_images(60, 1, labelled=labelled)
    return evaluate(checkpoint, train, test, classifier, OPTIONS, device=CPU)


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_report_on_a_conditional_checkpoint_is_complete(toy_classifier: Classifier) -> None:
    report = report_on(toy_checkpoint(), toy_classifier)
    assert report.left_out == ()
    assert report.bound is not None
    assert report.bound.total == pytest.approx(report.bound.L_T + report.bound.L_steps + report.bound.L_0)
    assert report.first.class_accuracy is not None
    assert report.first.class_accuracy.real == 1.0
    assert [c.num_samples for c in report.first.class_accuracy.per_class] == [4, 3, 3]
    assert report.first.classifier_frechet_distance is not None
    assert report.first.classifier_frechet_distance.samples > report.first.classifier_frechet_distance.real > 0
    assert report.first.memorisation.samples.minimum <= report.first.memorisation.samples.percentile_1
    assert report.first.memorisation.samples.percentile_1 <= report.first.memorisation.samples.median

    values = json.loads(report.to_json())
    assert all(np.isfinite(numbers(values)))
    assert values.keys() == {f.name for f in dataclasses.fields(report)}
    assert values["options"].items() < dataclasses.asdict(OPTIONS).items()

    markdown = report.to_markdown()
    for text in (
        *("variational bound", "bits/dim", "class accuracy", "classifier_frechet_distance", "is not FID", "median"),
        *("pixel_frechet_distance", "variance ratio", "precision", "recall"),
        *(*NAMES, "18446744073709551615", "guidance 2", "ddim, 3 steps", "toy 0", "toy 1"),
        *(report.weights_hash[:16], toy_classifier.weights_hash[:16]),
    ):
        assert text in markdown
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_report_leaves_out_what_a_checkpoint_or_data_without_classes_does_not_tell(toy_classifier: Classifier) -> None:
    report = report_on(toy_checkpoint(class_names=(), null_class=None), toy_classifier)
    assert report.first.class_accuracy is None
    assert report.first.classifier_frechet_distance is not None
    assert report.bound is not None
    assert {item.what for item in report.left_out} == {"guidance 2", "class_accuracy"}
    assert report.options.guidance == 1.0
    assert "Left out: class_accuracy (the checkpoint is unconditional" in report.to_markdown()
    report = report_on(toy_checkpoint(), None, labelled=False)
    assert report.first.class_accuracy is report.first.classifier_frechet_distance is report.classifier is None
    assert report.bound is not None  # of the null class
    assert np.isfinite(numbers(json.loads(report.to_json()))).all()
    assert {item.what for item in report.left_out} >= {"class_accuracy", "classifier_frechet_distance"}
    assert "is not FID" not in report.to_markdown()
    report = report_on(toy_checkpoint(class_names=("a", "b", "c"), null_class=None), toy_classifier)
    assert report.first.class_accuracy is report.bound is None
    assert {item.what for item in report.left_out} == {"guidance 2", "class_accuracy", "bound"}


def test_another_way_of_running_the_network_is_judged_by_its_samples(toy_classifier: Classifier) -> None:
    checkpoint, train, test = toy_checkpoint(), toy_images(96, 0), toy_images(60, 1)

    def report(options: EvaluateOptions, forward: Forward | None = None) -> Report:
        return evaluate(checkpoint, train, test, toy_classifier, options, device=CPU, forward=forward)

    def broken(x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        out: torch.Tensor = checkpoint.net(x, t, class_labels)
        return -out

    plain = report(OPTIONS)
    assert report(OPTIONS, checkpoint.net).first == plain.first
    other = report(dataclasses.replace(OPTIONS, precision="bfloat16", executor="broken"), broken)
    assert other.options.executor == "broken"
    assert "bfloat16, broken, cpu" in other.to_markdown()
    assert "float32, eager, cpu" in plain.to_markdown()
    assert other.bound == plain.bound
    assert other.first.classifier_frechet_distance != plain.first.classifier_frechet_distance


def test_classes_are_matched_by_name_not_by_number(toy_classifier: Classifier) -> None:
    plain, turned = toy_checkpoint(), toy_checkpoint(class_names=NAMES[::-1])
    with torch.no_grad():
        table = turned.net.class_embedding
        assert table is not None
        table.weight[:3] = table.weight[:3].flip(0).clone()
    one, other = report_on(plain, toy_classifier), report_on(turned, toy_classifier)
    assert other.bound == one.bound
    assert other.first.class_accuracy is not None
    assert [c.name for c in other.first.class_accuracy.per_class] == list(NAMES[::-1])
    assert all(c.real == 1.0 for c in other.first.class_accuracy.per_class)


def test_samples_do_not_depend_on_how_they_are_batched() -> None:
    checkpoint = toy_checkpoint()
    by_four, by_ten = (
        draw_samples(checkpoint.net, checkpoint, dataclasses.replace(OPTIONS, batch_size=b), device=CPU)
        for b in (4, 10)
    )
    assert (by_four.int() - by_ten.int()).abs().max() <= 1  # the batch moves float32 by a rounding


def test_evaluate_refuses_images_of_another_size_and_a_classifier_of_other_classes(toy_classifier: Classifier) -> None:
    train, test = toy_images(12, 0), toy_images(12, 1)
    colour = toy_images(12, 0, channels=3)
    with pytest.raises(EvaluateError, match=r"toy 0: images are \(3, 8, 8\), but toy makes \(1, 8, 8\)"):
        evaluate(toy_checkpoint(), colour, test, toy_classifier, OPTIONS, device=CPU)
    renamed = dataclasses.replace(test, class_names=("a", "b", "c"))
    with pytest.raises(EvaluateError, match="the classifier knows"):
        evaluate(toy_checkpoint(), train, renamed, toy_classifier, OPTIONS, device=CPU)


def test_weights_that_make_no_numbers_are_reported_and_not_judged() -> None:
    checkpoint = toy_checkpoint()
    torch.nn.init.constant_(checkpoint.net.conv_out.bias, torch.nan)
    with pytest.raises(EvaluateError, match=r"samples 0\.\.3 are not finite"):
        report_on(checkpoint, None)


def few_of_two_classes(seed: int) -> ImageSet:
    """Toy images, of which 30 of 34 are of one class."""
    data = toy_images(900, seed)
    assert data.labels is not None
    kept = torch.cat([(data.labels == k).nonzero()[:count, 0] for k, count in ((0, 300), (1, 20), (2, 20))])
    return dataclasses.replace(data, images=data.images[kept], labels=data.labels[kept])


@pytest.mark.parametrize("conditional", [True, False])
def test_real_images_are_of_the_mix_of_the_samples_where_classes_are_unequal(
    toy_classifier: Classifier, conditional: bool
) -> None:
    """Real images judged as samples are, of classes in turn or of the data's own mix, have about the floor's distance.

    So they have where classes are equal. In another mix they are further off by the distance of the classes.
    """
    checkpoint = toy_checkpoint() if conditional else toy_checkpoint(class_names=(), null_class=None)
    train, test = few_of_two_classes(0), few_of_two_classes(1)
    samples = (toy_images(60, 2) if conditional else few_of_two_classes(2)).images
    judge = Judge(checkpoint, train, test, toy_classifier, CPU)
    evenly = torch.linspace(0, len(samples) - 1, 60).round().long()  # in the mix that they have
    found = judge.figures(samples[evenly], 0, 0.0).classifier_frechet_distance
    assert found is not None
    of_classes = frechet_distance(
        *(fit_gaussian(toy_classifier.read(data.images).features) for data in (toy_images(60, 2), test))
    )
    assert found.real < 0.1 * of_classes
    assert found.samples < 0.1 * of_classes


# --- latent models ---


def test_a_latent_model_is_judged_by_its_decoded_images(tmp_path: Path) -> None:
    save_latent_pipeline(tmp_path, "kl", classes=4, in_channels=1, out_channels=1)
    edit_json(tmp_path / "tminus.json", class_names=list(NAMES), null_class=3)
    checkpoint = load_checkpoint(tmp_path)
    train, test = (big(toy_images(n, n)) for n in (24, 18))
    classifier = train_classifier(train, test, TRAINING, device=CPU)
    options = dataclasses.replace(OPTIONS, guidance=1.0, precision="float32")
    report = evaluate(checkpoint, train, test, classifier, options, device=CPU)
    assert "through the autoencoder, PSNR" in render(report, "a command", {})
    assert json.loads(report.to_json())["reconstruction"]["num_images"] == 10
    assert report.bound is None
    assert "Left out: bound (it is one of pixels" in report.to_markdown()
    lost = report.reconstruction
    assert lost is not None
    assert checkpoint.autoencoder is not None
    picked = test.images[balanced_picks(test, options.num_samples, options.seed)]
    with torch.no_grad():
        x = picked.float() / 127.5 - 1
        again = ((checkpoint.autoencoder.decode(checkpoint.autoencoder.encode(x)).clamp(-1, 1) + 1) * 127.5).round()
    assert lost.rms == pytest.approx(float((again / 127.5 - 1 - x).square().mean().sqrt()), rel=1e-3)
    assert lost.psnr_db == pytest.approx(20 * np.log10(2 / lost.rms), rel=1e-6)
    assert lost.frechet is not None
    assert "real images through the autoencoder, RMS error" in report.to_markdown()


def big(data: ImageSet) -> ImageSet:
    """Of 16x16 pixels."""
    return dataclasses.replace(data, images=data.images.repeat_interleave(2, 2).repeat_interleave(2, 3))


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | fields))


@pytest.mark.parametrize("timesteps", [1, 2, 7, 19, 1000])
def test_the_terms_add_up_to_the_bound(timesteps: int) -> None:
    checkpoint = toy_checkpoint()
    options = dataclasses.replace(OPTIONS, bound_images=10, bound_timesteps=timesteps)
    bound = measure_bound(checkpoint.net, checkpoint, TEST, options)
    assert isinstance(bound, Bound)
    assert len(bound.terms) == bound.timesteps_per_image == min(timesteps, 19)
    assert [t for term in bound.terms for t in range(term.first, term.last + 1)] == [*range(1, 20)]
    sum_of_terms = sum(term.bits_per_dim * (term.last + 1 - term.first) for term in bound.terms)
    assert sum_of_terms == pytest.approx(bound.L_steps, rel=1e-12)
    assert bound.L_T + sum_of_terms + bound.L_0 == pytest.approx(bound.total, rel=1e-12)


def test_a_term_is_the_mean_over_images_of_that_timestep_s_kl() -> None:
    checkpoint = toy_checkpoint()
    options = dataclasses.replace(OPTIONS, bound_images=5, bound_timesteps=19, batch_size=2)
    bound = measure_bound(checkpoint.net, checkpoint, TEST, options)
    assert isinstance(bound, Bound)
    assert TEST.labels is not None
    picked = balanced_picks(TEST, 5, options.seed)
    schedule = checkpoint.noise.schedule()
    one_by_one = [
        variational_bound(
            checkpoint.net, checkpoint.noise, schedule, to_model_range(TEST.images[i : i + 1]), TEST.labels[i : i + 1],
            seed=options.seed, indices=[i],
        )
        for i in picked.tolist()
    ]  # fmt: skip
    by_term = torch.cat([each.L_drawn for each in one_by_one], dim=1).mean(1)
    assert [term.bits_per_dim for term in bound.terms] == pytest.approx(by_term.tolist(), rel=1e-4)
    totals = torch.cat([each.total for each in one_by_one])
    assert bound.total == pytest.approx(float(totals.mean()), rel=1e-4)
    assert bound.standard_error == pytest.approx(float(totals.std() / 5**0.5), rel=1e-3)


def test_a_bound_that_is_not_defined_is_left_out_with_the_reason() -> None:
    for checkpoint, why in (
        (toy_checkpoint(learned=True), "learned its own"),
        (dataclasses.replace(toy_checkpoint(), student={"guidance": 1.5}), "a student predicts where"),
        (toy_checkpoint(class_names=("a", "b", "c"), null_class=None), "needs a class"),
    ):
        left_out = measure_bound(checkpoint.net, checkpoint, TEST, OPTIONS)
        assert isinstance(left_out, LeftOut)
        assert why in left_out.why
