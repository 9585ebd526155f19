"""The bound of a checkpoint, held to the bound of its images one by one, and its curve to the sum."""

import dataclasses

import pytest
import torch

from tests.model.evaluation.toys import NAMES, OPTIONS, toy_checkpoint, toy_images
from tminus.model.evaluation.bound import measure_bound
from tminus.model.evaluation.classes import balanced_picks
from tminus.model.evaluation.figures import Bound, LeftOut, Term
from tminus.model.loss import variational_bound
from tminus.model.noise import NoiseConfig
from tminus.model.pixels import to_model_range

TEST = toy_images(60, 1)


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


def test_a_chain_of_one_step_has_no_terms() -> None:
    checkpoint = toy_checkpoint(NAMES)
    short = dataclasses.replace(checkpoint, noise=NoiseConfig(num_train_timesteps=1, beta_start=0.5, beta_end=0.5))
    bound = measure_bound(short.net, short, TEST, OPTIONS)
    assert isinstance(bound, Bound)
    assert (bound.terms, bound.L_steps, bound.timesteps_per_image) == ((), 0, 0)
    assert bound.reaches(0.9) == 0


def test_the_share_of_the_bound_is_reached_where_its_terms_say() -> None:
    terms = (Term(1, 1, 3.0), Term(2, 3, 1.0), Term(4, 9, 0.5))
    bound = Bound(0.0, 8.0, 2.0, 10.0, 0.1, 5, 3, terms)
    assert [bound.reaches(share) for share in (0.2, 0.5, 0.51, 0.7, 0.71, 1.0)] == [0, 1, 3, 3, 9, 9]


def test_a_bound_survives_json() -> None:
    checkpoint = toy_checkpoint()
    bound = measure_bound(checkpoint.net, checkpoint, TEST, OPTIONS)
    assert isinstance(bound, Bound)
    assert Bound.from_dict(dataclasses.asdict(bound)) == bound
