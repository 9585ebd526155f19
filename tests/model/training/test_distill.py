import dataclasses
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from tests.model.training.test_train import assert_same_run, interrupt_at, provenance_in, state_of, toy_images
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.evaluation.distances import Gaussian, fit_gaussian, frechet_distance
from tminus.model.files import CheckpointError
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig, gather
from tminus.model.pixels import to_model_range
from tminus.model.samplers import Plan, compile_plan, denoise, sample, solve
from tminus.model.training import distill as distill_module
from tminus.model.training import network_features as frechet_module
from tminus.model.training import teacher as teacher_module
from tminus.model.training.config import DistillConfig, TrainConfig
from tminus.model.training.data import ImageSet
from tminus.model.training.distill import (
    consistency_plan,
    distill,
    predict_x0,
    pseudo_huber,
    student_noise,
    student_points,
)
from tminus.model.training.run import STATE_FILE, TrainError
from tminus.model.training.train import train
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONDITIONAL = UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 3, "dropout": 0.1})
NOISE = NoiseConfig(num_train_timesteps=50, beta_end=0.2)
LABELS = Labels(("left", "right"), null_class=2)
RUN = DistillConfig(
    steps=8,
    batch_size=4,
    learning_rate=2e-3,
    warmup_steps=3,
    seed=5,
    precision="fp32",
    save_every=3,
    guidance=2.0,
    teacher_steps=5,
    trajectories=7,
    uses=2,
    first_share=0.5,
)  # a round is 7 steps
UNCLIPPED = NoiseConfig(clip_sample=False)
SCHEDULE = UNCLIPPED.schedule()
SIGMA_DATA = 0.5
SHAPE = (6, 1, 4, 4)


def write_teacher(folder: Path, unet: UNetConfig = CONDITIONAL, labels: Labels = LABELS, **noise: Any) -> Path:
    net = UNet2D(unet)
    randomize(net)
    save_checkpoint(folder, net.state_dict(), unet, dataclasses.replace(NOISE, **noise), labels, {})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module, "REFERENCE_ROWS", 32)
        patch.setattr(frechet_module, "LEAST_ROWS", 4)
        patch.setattr(frechet_module, "ALL_ROWS", 8)
        yield


@pytest.fixture(scope="module")
def straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run(folder, teacher)
    return folder


def run(folder: Path, teacher: Path, **changes: Any) -> bool:
    return distill(folder, teacher, dataclasses.replace(RUN, **changes), device=CPU)


def tables_in(folder: Path) -> list[Any]:
    return [json.loads(file.read_text("utf-8")) for file in sorted((folder / "samplers").iterdir())]


# --- what a run leaves behind -------------------------------------------------------------------------------------


def test_student_is_a_checkpoint_that_says_what_it_is_made_for(straight: Path, teacher: Path) -> None:
    student, state = load_checkpoint(straight), state_of(straight)
    assert student.samplers == ("consistency",)
    assert student.student is not None
    assert student.student["guidance"] == student.folded_guidance == 2.0
    assert student.student["steps"] == [1, 2, 3, 4]
    assert student.student["teacher"] == "teacher"
    assert student.student["teacher_hash"] == load_checkpoint(teacher).weights_hash
    assert student.recommended is not None
    assert (student.recommended.sampler, student.recommended.steps) == ("consistency", 2)
    assert student.refused_tables == ()
    assert student.noise == dataclasses.replace(NOISE, prediction_type="v_prediction")
    assert student.labels == LABELS
    for key, value in student.net.state_dict().items():
        assert torch.equal(value, state["ema"][key])
    assert provenance_in(straight)["trained_by"] == "tminus distill"
    for steps in (1, 2, 3, 4):
        plan = student.plan("consistency", steps)
        assert len(plan) == steps
        x_T = torch.randn(2, 1, 8, 8)
        images = sample(student.net, plan, x_T, lambda _k: torch.zeros(2, 1, 8, 8), class_labels=torch.tensor([0, 2]))
        assert bool(torch.isfinite(images).all())


def test_guidance_of_a_student_multiplies_that_in_its_teachers_weights(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher")
    file = teacher / "tminus.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "folded_guidance": 1.2}), "utf-8")
    assert run(tmp_path / "run", teacher, steps=1, guidance=1.5)
    assert load_checkpoint(tmp_path / "run").folded_guidance == 1.8
    file = tmp_path / "run" / "tminus.json"
    meta = json.loads(file.read_text("utf-8"))
    del meta["folded_guidance"]  # as earlier versions wrote it
    file.write_text(json.dumps(meta), "utf-8")
    assert load_checkpoint(tmp_path / "run").folded_guidance == 1.8


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7])  # in the first round, at its end
def test_interrupted_and_resumed_run_is_the_run_never_interrupted(
    straight: Path, tmp_path: Path, teacher: Path, step: int
) -> None:
    config = dataclasses.replace(RUN, sheet_every=1)
    stop = interrupt_at(step)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        distill(folder, teacher, config, device=CPU, on_sheet=lambda net, _plan, now: stop(net, now))
    assert state_of(folder)["step"] == step
    assert run(folder, teacher)
    assert_same_run(straight, folder)
    assert tables_in(straight) == tables_in(folder)


def test_run_that_is_stopped_before_it_knows_the_reference_is_saved_and_goes_on(
    straight: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = teacher_module.Teacher.reference

    def stopped(*args: Any) -> Gaussian | None:
        signal.raise_signal(signal.SIGTERM)
        return reference(*args)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_module.Teacher, "reference", stopped)
        assert not run(tmp_path, teacher)
    assert state_of(tmp_path)["step"] == 0
    assert run(tmp_path, teacher)
    assert_same_run(straight, tmp_path)


def test_resuming_with_another_config_is_refused(tmp_path: Path, teacher: Path) -> None:
    run(tmp_path, teacher, steps=1)
    for field, value in {"guidance": 1.5, "student_steps": (2,)}.items():
        was, got = (json.dumps(each) for each in (getattr(RUN, field), value))
        with pytest.raises(TrainError, match=re.escape(f"begun with {field}={was}, got {got}")):
            run(tmp_path, teacher, **{field: value})


# --- what is refused ----------------------------------------------------------------------------------------------


def test_student_is_neither_distilled_nor_trained_from(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is a student itself; distill its teacher"):
        run(tmp_path / "run", straight)
    config = TrainConfig(steps=1, batch_size=4, precision="fp32")
    with pytest.raises(TrainError, match="is a student, made for few steps; begin from its teacher"):
        train(tmp_path / "new", toy_images(), CONDITIONAL, NOISE, config, device=CPU, init_from=straight)


def test_neither_the_teacher_nor_an_autoencoder_is_overwritten(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is the teacher's folder"):
        run(teacher / ".." / teacher.name, teacher)
    assert not (teacher / STATE_FILE).exists()
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(CheckpointError, match="has an autoencoder in vqvae/"):
        run(tmp_path, teacher)
    assert [file.name for file in tmp_path.iterdir()] == ["vqvae"], "refused before any step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_steps": (1, 5)}, r"student_steps must be different numbers in 1\.\.4, got \(1, 5\)"),
        ({"teacher_steps": 3}, "teacher_steps must be 4 or more, the student's steps, got 3"),
        ({"guidance": -1.0}, r"guidance must be in 0\.\.50, got -1\.0"),
        ({"first_share": 1.5}, r"first_share must be in 0\.\.1, got 1\.5"),
        ({"first_share": 0.1}, r"first_share must be at least 1/4, one of a batch, got 0\.1"),
        ({"frechet_weight": -1.0}, r"frechet_weight must be 0 or more, got -1\.0"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_bound(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUN, **changes)


def test_data_unlike_what_the_teacher_makes_and_solvers_that_it_has_not_are_refused(
    tmp_path: Path, teacher: Path
) -> None:
    for size_px, classes, message in (
        (16, ("left", "right"), r"toys: has images of \(1, 16, 16\), and the teacher makes \(1, 8, 8\)"),
        (8, ("left", "middle", "right"), "toys: has 3 classes, and the teacher 2"),
        (8, (), "toys: has 0 classes, and the teacher 2"),
    ):
        labels = torch.arange(6) % len(classes) if classes else None
        data = ImageSet(torch.zeros(6, 1, size_px, size_px, dtype=torch.uint8), labels, classes, "toys")
        with pytest.raises(TrainError, match=message):
            distill(tmp_path / "run", teacher, RUN, device=CPU, data=data)
    with pytest.raises(TrainError, match=r"teacher_steps must be 1\.\.50, got 51"):
        run(tmp_path / "run", teacher, teacher_steps=51)
    with pytest.raises(TrainError, match=r"teacher_sampler must be among ddim, .*, got 'ddpm'"):
        run(tmp_path / "run", teacher, teacher_sampler="ddpm")
    assert not (tmp_path / "run").exists()


# --- learning -----------------------------------------------------------------------------------------------------


def losses_of(monkeypatch: pytest.MonkeyPatch, folder: Path, teacher: Path, **changes: Any) -> list[float]:
    losses: list[float] = []
    original = distill_module.pseudo_huber

    def record(x0: Tensor, target: Tensor) -> Tensor:
        loss = original(x0, target)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(distill_module, "pseudo_huber", record)
    run(folder, teacher, **changes)
    return losses


def test_student_learns_where_trajectories_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path) -> None:
    four = {"trajectories": 4, "uses": 1000, "save_every": 1000, "frechet_weight": 0.0}
    losses = losses_of(monkeypatch, tmp_path, teacher, steps=80, batch_size=8, learning_rate=1e-2, **four)
    first, last = sum(losses[:5]) / 5, sum(losses[-10:]) / 10
    assert last < 0.7 * first


def test_part_of_a_batch_is_pure_noise_and_goes_on_as_in_sampling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path
) -> None:
    seen: list[Tensor] = []
    predict_x0 = distill_module.predict_x0

    def record(plan: Plan, k: Tensor, x: Tensor, out: Tensor) -> Tensor:
        seen.append(k.clone())
        return predict_x0(plan, k, x, out)

    monkeypatch.setattr(distill_module, "predict_x0", record)
    run(tmp_path, teacher, steps=4, batch_size=500, first_share=0.4)
    of_trajectories, of_own = torch.cat(seen[0::2]), torch.cat(seen[1::2])
    counts = of_trajectories.bincount(minlength=4) / 2000
    assert counts[0].item() == pytest.approx(0.4)
    assert counts[1:].tolist() == pytest.approx([0.2] * 3, abs=0.03)
    assert len(of_own) == 800
    assert (of_own.bincount(minlength=4) / 800).tolist() == pytest.approx([0.0, *[1 / 3] * 3], abs=0.06)


def numbers_of(folder: Path, count: int = 400) -> Gaussian:
    """How images of a student, or of a teacher by its solver, are distributed."""
    checkpoint = load_checkpoint(folder)
    sampler = ("consistency", 1) if checkpoint.student is not None else ("dpmpp_2m", 5)
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % 2
    images = sample(checkpoint.net, checkpoint.plan(*sampler), x_T, lambda _k: x_T, class_labels=labels)
    return fit_gaussian(images.flatten(1))


@pytest.mark.long
def test_images_are_to_be_distributed_as_the_data(tmp_path: Path, teacher: Path) -> None:
    """The data are darker than anything that the teacher makes."""
    dark = ImageSet(torch.full((40, 1, 8, 8), 20, dtype=torch.uint8), torch.arange(40) % 2, ("left", "right"), "dark")
    dark.images.add_(
        torch.randint(20, dark.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    )
    settings = {"steps": 60, "batch_size": 16, "learning_rate": 3e-3, "guidance": 1.0, "student_steps": (1,)}
    run(tmp_path / "own", teacher, **settings)
    config = dataclasses.replace(RUN, frechet_weight=30.0, **settings)
    distill(tmp_path / "dark", teacher, config, device=CPU, data=dark)
    own, as_data = numbers_of(tmp_path / "own"), numbers_of(tmp_path / "dark")
    wanted = fit_gaussian(to_model_range(dark.images).flatten(1))
    assert frechet_distance(as_data, wanted) < 0.7 * frechet_distance(own, wanted)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_normal_data(x: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
    """The best possible eps where the data are N(0, SIGMA_DATA^2): sigma_t x / (the variance of x_t)."""
    alpha_bar = gather(SCHEDULE.alpha_bar, t.long(), x)
    return (1 - alpha_bar).sqrt() * x / (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar)


def end_of(x: Tensor, alpha_bar: Tensor) -> Tensor:
    """Where the probability flow of such data leads, in closed form: x scaled to the spread of the data."""
    return x * SIGMA_DATA / (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar).sqrt()


def perfect(x: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
    """The v of a student that knows every end: v = (sqrt(alpha_bar) x - x0) / sqrt(1 - alpha_bar)."""
    alpha_bar = gather(SCHEDULE.alpha_bar, t.long(), x)
    return (alpha_bar.sqrt() * x - end_of(x, alpha_bar)) / (1 - alpha_bar).sqrt()


# --- trajectories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps", "within"), [("ddim", 500, 0.02), ("dpmpp_2m", 100, 0.01)])
def test_trajectories_of_normal_data_end_where_the_closed_form_says(sampler: str, steps: int, within: float) -> None:
    plan = compile_plan(UNCLIPPED, SCHEDULE, sampler, steps)
    points = solve(of_normal_data, plan, normal(*SHAPE))
    assert points.shape == (steps + 1, *SHAPE)
    for k in (0, steps // 2, steps - 1):
        assert torch.allclose(end_of(points[k], plan.alpha_bar[k]), points[-1], rtol=within, atol=1e-3)


def test_trajectory_is_what_the_sampler_makes_and_goes_on_from_each_of_its_points() -> None:
    net = UNet2D(UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 4})).eval()
    randomize(net)
    noise = NoiseConfig(num_train_timesteps=20, beta_end=0.3)
    plan = compile_plan(noise, noise.schedule(), "ddim", 5)
    x_T, labels = normal(3, 1, 8, 8).float(), torch.tensor([0, 2, 3])
    points = solve(net, plan, x_T, labels, 3, 2.0)
    zero = torch.zeros_like(x_T)
    for start in range(5):
        rest = compile_plan(noise, noise.schedule(), "ddim", 5, start=start)
        end = sample(net, rest, points[start], lambda _k: zero, class_labels=labels, null_class=3, guidance=2.0)
        assert torch.equal(end, points[-1])


# --- the loss -----------------------------------------------------------------------------------------------------


def test_student_that_knows_every_end_is_consistent_along_a_trajectory_and_another_is_not() -> None:
    plan = consistency_plan(student_noise(UNCLIPPED), list(range(999, -1, -111)))
    k = torch.arange(len(plan)).repeat_interleave(SHAPE[0])
    end = normal(*SHAPE, seed=2)
    alpha_bar = gather(plan.alpha_bar, k, end.repeat(len(plan), 1, 1, 1))
    x_t = end.repeat(len(plan), 1, 1, 1) * (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar).sqrt() / SIGMA_DATA

    def loss(student: Forward) -> float:
        x0 = predict_x0(plan, k, x_t, student(x_t, plan.timesteps[k], None))
        later = x0.roll(-SHAPE[0], 0)
        return float(pseudo_huber(x0[: -SHAPE[0]], later[: -SHAPE[0]]))

    assert loss(perfect) < 1e-12
    assert loss(lambda x, t, labels: perfect(x, t) + 0.1) > 1e-3


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [[999], [999, 547], [999, 769, 450, 172]])
def test_step_is_that_of_diffusers(timesteps: list[int]) -> None:
    theirs = LCMScheduler(
        num_train_timesteps=1000,
        beta_start=UNCLIPPED.beta_start,
        beta_end=UNCLIPPED.beta_end,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_scaling=1e9,  # its own scaling towards the input at t = 0 is then off
    )
    theirs.set_timesteps(timesteps=timesteps)
    theirs.alphas_cumprod = SCHEDULE.alpha_bar  # in float64, so that formulas are compared and not rounding
    plan = consistency_plan(student_noise(NoiseConfig()), timesteps)
    x = normal(*SHAPE)
    for k, t in enumerate(timesteps):
        out = normal(*SHAPE, seed=10 + k)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        expected = theirs.step(out, torch.tensor(t), x, generator=torch.Generator().manual_seed(k))
        x, x0 = denoise(x, out, torch.zeros_like(x), z, plan.lines[k : k + 1].expand(SHAPE[0], -1))
        assert torch.allclose(x0, expected.denoised, atol=1e-9)
        assert torch.allclose(x, expected.prev_sample, atol=1e-9)


def test_points_of_few_steps_are_among_those_of_more_and_begin_at_pure_noise() -> None:
    alpha_bar = compile_plan(UNCLIPPED, SCHEDULE, "dpmpp_2m", 20).alpha_bar
    points = [student_points(alpha_bar, steps) for steps in (1, 2, 3, 4)]
    assert points == [[0], [0, 16], [0, 14, 16], [0, 14, 16, 17]]
    assert [round(float(alpha_bar[k]), 2) for k in points[-1]] == [0.0, 0.05, 0.34, 0.73]
