"""The tests before serving: the same bits alone and together, and how long ticks take."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.service.conftest import Around, MakeCheckpoint
from tests.service.fakes import INFO, FakeEngine
from tminus.model.noise import NoiseConfig
from tminus.service.engine import engine
from tminus.service.engine.autotune import AGREE_ROWS
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.loading import (
    BUDGET_S,
    ROUNDS,
    SLOW_TICK_S,
    TICKS,
    WARM_UP,
    measure_ticks,
)
from tminus.service.engine.selftest import network_keeps_rows_apart, samplers_keep_rows_apart
from tminus.service.spec import Floats
from tminus.service.work import Batch

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Mixing(Around):
    """An executor whose output depends, ever so little, on what else is in the batch."""

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return super().__call__(x, t, class_labels) + 1e-7 * x.mean()


class ByPosition(Around):
    """An executor that treats the last place of a pass otherwise, as a vector unit's tail may."""

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        out = super().__call__(x, t, class_labels).clone()
        if len(out) > 1:
            out[-1] *= 1 + 2e-7
        return out


PLAIN: dict[str, object] = {}
OTHERS: tuple[dict[str, object], ...] = (
    {"classes": False},
    {"noise": NoiseConfig(num_train_timesteps=2)},
    {"out_channels": 2, "noise": NoiseConfig(num_train_timesteps=20, variance_type="learned_range")},
    {"noise": NoiseConfig(num_train_timesteps=20, rescale_betas_zero_snr=True, prediction_type="v_prediction")},
)


@pytest.mark.parametrize(("fields", "max_batch"), [(PLAIN, 2), *zip(OTHERS, (4, 7, 64, 16), strict=True)])
def test_good_rows_are_kept_apart(make_checkpoint: MakeCheckpoint, fields: dict[str, object], max_batch: int) -> None:
    checkpoint = make_checkpoint(**fields)
    assert samplers_keep_rows_apart(checkpoint, CPU, max_batch)
    executor = EagerExecutor(checkpoint.net, CPU, sizes=(1,))
    assert False not in network_keeps_rows_apart(executor, checkpoint, CPU, max_batch)


def verdicts(tests: Iterator[bool | None]) -> Iterator[bool]:
    return (same for same in tests if same is not None)


@pytest.mark.parametrize("kind", [Mixing, ByPosition])
def test_an_executor_whose_output_depends_on_its_neighbours_fails_in_the_first_batch(
    make_checkpoint: MakeCheckpoint, kind: type[Around]
) -> None:
    checkpoint = make_checkpoint()
    executor = kind(EagerExecutor(checkpoint.net, CPU, sizes=(1,)))
    assert next(verdicts(network_keeps_rows_apart(executor, checkpoint, CPU, 4))) is False


def test_each_number_of_rows_is_tried_the_largest_early_and_the_first_cost_little(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint, passes = make_checkpoint(), list[int]()

    class Counting(Around):
        def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            passes.append(len(x))
            return super().__call__(x, t, class_labels)

    tests = network_keeps_rows_apart(
        Counting(EagerExecutor(checkpoint.net, CPU, sizes=(1,))), checkpoint, CPU, max_batch=6
    )
    for passes_done in ([1], [1, 1], [1, 1, 2]):
        next(tests)
        assert passes == passes_done, "a job that comes waits for one batch at most"
    assert all(verdicts(tests))
    assert [rows for rows in passes if rows > 1] == [2, 3, 6, 4, 5]
    assert passes.count(1) == AGREE_ROWS, "each row runs alone once"


@pytest.mark.parametrize("name", ["guide", "denoise"])
def test_an_update_that_mixes_rows_fails(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = getattr(engine, name)

    def mixing(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first + 1e-7 * first.mean()
        return (first, *rest) if isinstance(out, tuple) else first

    monkeypatch.setattr(engine, name, mixing)
    assert not samplers_keep_rows_apart(make_checkpoint(), CPU, 4)


class Clock:
    """Time that passes in ticks: so many seconds for one of so many places."""

    def __init__(self, engine: FakeEngine) -> None:
        self.now_s, self.engine = 0.0, engine
        engine.on_step = self.tick

    def seconds(self, batch: Batch) -> float:
        return 0.001 * (3 + batch.places)

    def tick(self, batch: Batch) -> None:
        self.now_s += self.seconds(batch)

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("max_batch", "places"), [(1, [1]), (23, [1, 2, 4, 8, 16, 23])])
def test_powers_of_two_and_the_largest_batch_are_measured(max_batch: int, places: list[int]) -> None:
    engine = FakeEngine()
    points = measure_ticks(engine, max_batch, Clock(engine))
    assert [count for count, _ in points] == places
    for count, seconds in points:
        assert seconds == pytest.approx(0.001 * (3 + count))
    assert engine.jobs == {}, "its slots are free"
    assert len(engine.batches) == len(places) * ROUNDS * TICKS


def test_the_first_two_ticks_of_a_size_and_one_disturbance_do_not_count() -> None:
    """The first may compile; the second, on a GPU, is over as soon as it is launched."""
    engine = FakeEngine()

    class Disturbed(Clock):
        def seconds(self, batch: Batch) -> float:
            return {0: 0.9, 1: 0.0001, 3: 0.5}.get(batch.steps[0], 0.01)

    assert [seconds for _, seconds in measure_ticks(engine, 4, Disturbed(engine))] == pytest.approx([0.01] * 3)


def test_no_further_round_begins_when_much_time_has_passed() -> None:
    engine = FakeEngine()

    class Slow(Clock):
        def seconds(self, batch: Batch) -> float:
            return BUDGET_S / 10

    assert [places for places, _ in measure_ticks(engine, 4, Slow(engine))] == [1, 2, 4]
    assert len(engine.batches) == 3 * TICKS


@pytest.mark.parametrize(("num_timesteps", "expected"), [(2, 0.1), (3, 0.5)])
def test_where_there_are_two_ticks_at_most_the_faster_counts(num_timesteps: int, expected: float) -> None:
    engine = FakeEngine(replace(INFO, num_timesteps=num_timesteps))

    class Uneven(Clock):
        def seconds(self, batch: Batch) -> float:
            return (0.9, 0.1, 0.5)[batch.steps[0]]

    ((_, seconds),) = measure_ticks(engine, 1, Uneven(engine))
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_of_an_engine_that_runs_ahead_two_ticks_are_timed_to_their_end(num_timesteps: int) -> None:
    """As on a GPU: a tick takes the host no time, until something waits for the device."""
    engine = FakeEngine(replace(INFO, num_timesteps=num_timesteps))
    clock = Clock(engine)
    running: list[Batch] = []
    latents = engine.latents

    def wait_for_device(rows: Sequence[int]) -> Floats:
        while running:
            clock.tick(running.pop())
        return latents(rows)

    engine.on_step, engine.latents = running.append, wait_for_device  # type: ignore[method-assign]
    ((_, seconds),) = measure_ticks(engine, 1, clock)
    assert seconds >= 0.004


def test_where_ticks_are_slow_larger_ones_are_not_tried() -> None:
    engine = FakeEngine()

    class Slow(Clock):
        def seconds(self, batch: Batch) -> float:
            return SLOW_TICK_S * batch.places * 0.7

    points = measure_ticks(engine, 64, Slow(engine))
    assert [count for count, _ in points] == [1, 2]
    assert points[-1][1] == pytest.approx(SLOW_TICK_S * 1.4)
    assert len(engine.batches) == WARM_UP + 1 + 1
    assert engine.jobs == {}


@pytest.mark.parametrize(("sampler", "num_timesteps"), [("heun", 2), ("plms", 4), ("pndm", 4)])
def test_a_network_of_few_timesteps_is_measured_by_as_many_steps_as_its_sampler_takes(
    make_checkpoint: MakeCheckpoint, sampler: str, num_timesteps: int
) -> None:
    checkpoint = make_checkpoint(noise=NoiseConfig(num_train_timesteps=num_timesteps, default_sampler=sampler))
    executor = EagerExecutor(checkpoint.net, torch.device("cpu"), sizes=(1,))
    engine = Engine(checkpoint, executor, torch.device("cpu"), max_rows=8, max_jobs=4)
    assert [places for places, _ in measure_ticks(engine, 2, rounds=1)] == [1, 2]
