"""The search for timesteps gets nearer, and ends."""

from pathlib import Path

import pytest

from tests.model.tuning.nets import NOISE, fitter_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.tuning.search import Search, moved, search_timesteps

pytestmark = pytest.mark.slow


def test_the_search_only_ever_gets_nearer_and_ends(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    begun = Search(fitter.fit((49.0, 46.0, 43.0)))
    rounds: list[Search] = []
    found = search_timesteps(fitter, begun, tuple, fitter.schedule.log_sigmas, rounds.append)
    errors = [begun.best.held_out, *(each.best.held_out for each in rounds)]
    assert errors == sorted(errors, reverse=True)
    assert found.best.held_out < begun.best.held_out
    assert found.best.timesteps[0] == 49
    assert all(now > then for now, then in zip(found.best.timesteps, found.best.timesteps[1:], strict=False))


@pytest.mark.parametrize("share", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_a_moved_timestep_stays_between_its_neighbours(k: int, share: float) -> None:
    log_sigmas = NOISE.schedule().log_sigmas
    t = moved((49.0, 20.0, 0.5), k, 0.9 * share, log_sigmas)
    assert t[0] > t[1] > t[2] >= 0
    assert (t[k] > (49.0, 20.0, 0.5)[k]) == (share > 0)
