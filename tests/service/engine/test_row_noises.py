"""Noise of rows between two seeds: the formula in float64, its ends, its spread, and slots that change hands."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.service.engine.edits import edit, edited_alone, half_mask, picture
from tests.service.engine.engines import CPU, alone, spec_of
from tests.service.fakes import make_spec
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service.engine.row_state import RowNoises, first_noise
from tminus.service.spec import Inputs

SHAPE = (3, 5, 4)
SEEDS = st.integers(0, 2**64 - 1)


def drawn(noises: RowNoises, rows: list[int], draw: int) -> torch.Tensor:
    mixes = torch.tensor(noises.mixes(np.array(rows)))
    return noises.draw(torch.tensor(rows), torch.full((len(rows),), draw), mixes)


def put(noises: RowNoises, rows: list[int], **fields: Any) -> None:
    noises.put(torch.tensor(rows), rows, make_spec(n=len(rows), **fields))


@given(SEEDS, SEEDS, st.floats(0, 1), st.integers(0, 1001))
def test_noise_between_two_seeds_is_cos_and_sin_of_theirs(seed: int, to_seed: int, mix: float, draw: int) -> None:
    noises = RowNoises(4, SHAPE, CPU)
    put(noises, [2, 0], seed=seed, to_seed=to_seed, mix=mix, index=8)
    here, there = (image_noise(each, [8, 9], draw, SHAPE, CPU).double() for each in (seed, to_seed))
    angle = mix * math.pi / 2
    expected = math.cos(angle) * here + math.sin(angle) * there
    torch.testing.assert_close(drawn(noises, [2, 0], draw).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_the_ends_are_the_images_of_the_two_seeds(tiny: Checkpoint, sampler: str) -> None:
    walk = [alone(tiny, spec_of(n=2, seed=5, to_seed=6, mix=mix, index=3, sampler=sampler)) for mix in (0.0, 0.5, 1.0)]
    for seed, at in ((5, 0), (6, 2)):
        np.testing.assert_array_equal(walk[at], alone(tiny, spec_of(n=2, seed=seed, index=3, sampler=sampler)))
    assert (walk[1] != walk[0]).any()
    assert (walk[1] != walk[2]).any()


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_ends_of_a_walk_of_edits_are_the_edits_of_the_two_seeds(tiny: Checkpoint, strength: float | None) -> None:
    inputs = Inputs(picture(), half_mask())
    at_end = edited_alone(tiny, edit(inputs, seed=5, to_seed=6, mix=1.0, strength=strength))
    np.testing.assert_array_equal(at_end, edited_alone(tiny, edit(inputs, seed=6, strength=strength)))


def test_rows_of_one_seed_beside_a_walk_have_the_bits_they_have_without() -> None:
    noises = RowNoises(4, SHAPE, CPU)
    put(noises, [0, 1], seed=1)
    put(noises, [2, 3], seed=2, to_seed=3, mix=0.4)
    expected = image_noise(1, [0, 1], 7, SHAPE, CPU)
    assert torch.equal(drawn(noises, [3, 0, 2, 1], 7)[[1, 3]], expected)
    assert torch.equal(drawn(noises, [0, 1], 7), expected)


def test_a_slot_that_was_a_walks_is_no_longer() -> None:
    noises = RowNoises(2, SHAPE, CPU)
    put(noises, [0, 1], seed=2, to_seed=3, mix=0.4)
    put(noises, [1], seed=9)
    assert torch.equal(drawn(noises, [0, 1], 0)[1:], image_noise(9, [0], 0, SHAPE, CPU))


def test_the_first_noise_is_draw_0_to_the_bit() -> None:
    spec = make_spec(n=3, seed=2, to_seed=3, mix=0.3, index=1)
    noises = RowNoises(3, SHAPE, CPU)
    noises.put(torch.tensor([0, 1, 2]), [0, 1, 2], spec)
    assert torch.equal(first_noise(spec, SHAPE, CPU), drawn(noises, [0, 1, 2], 0))
