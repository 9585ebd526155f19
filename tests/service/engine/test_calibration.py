from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tests.service.fakes import INFO, FakeEngine
from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.selftest import BUDGET_S, ROUNDS, SLOW_TICK_S, TICKS, measure_ticks
from tminus.service.spec import Floats
from tminus.service.work import Batch


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


@pytest.mark.parametrize(
    ("max_batch", "places"),
    [
        (1, [1]),
        (2, [1, 2]),
        (4, [1, 2, 4]),
        (5, [1, 2, 4, 5]),
        (16, [1, 2, 4, 8, 16]),
        (23, [1, 2, 4, 8, 16, 23]),
    ],
)
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


def test_a_machine_that_is_disturbed_for_a_while_disturbs_no_size() -> None:
    engine = FakeEngine()

    class Busy(Clock):
        def seconds(self, batch: Batch) -> float:
            return 0.01 * (3 if 0.1 < self.now_s < 0.2 else 1)

    assert [seconds for _, seconds in measure_ticks(engine, 8, Busy(engine))] == pytest.approx([0.01] * 4)


def test_no_further_round_begins_when_much_time_has_passed() -> None:
    engine = FakeEngine()

    class Slow(Clock):
        def seconds(self, batch: Batch) -> float:
            return BUDGET_S / 10

    assert [places for places, _ in measure_ticks(engine, 4, Slow(engine))] == [1, 2, 4]
    assert len(engine.batches) == 3 * TICKS


@pytest.mark.parametrize(("num_timesteps", "expected"), [(1, 0.9), (2, 0.1), (3, 0.5)])
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
    assert len(engine.batches) == TICKS + 1
    assert engine.jobs == {}


@pytest.mark.parametrize("num_timesteps", [1, 2, 3])
def test_a_model_of_few_timesteps_is_measured_too(num_timesteps: int) -> None:
    engine = FakeEngine(replace(INFO, num_timesteps=num_timesteps))
    assert [count for count, _ in measure_ticks(engine, 4, Clock(engine))] == [1, 2, 4]


def test_an_unconditional_model_is_measured_too() -> None:
    engine = FakeEngine(replace(INFO, conditional=False, class_names=(), null_class=None))
    assert len(measure_ticks(engine, 2, Clock(engine))) == 2


def test_a_model_that_gives_nan_is_measured_all_the_same() -> None:
    engine = FakeEngine()
    clock = Clock(engine)

    def tick(batch: Batch) -> None:
        clock.tick(batch)
        engine.nan |= set(batch.rows)

    engine.on_step = tick
    assert len(measure_ticks(engine, 2, clock)) == 2
    assert engine.jobs == {}


def test_a_real_engine_takes_some_time(tiny: Checkpoint) -> None:
    device = torch.device("cpu")
    engine = Engine(tiny, EagerExecutor(tiny.net, device), device, max_rows=8, max_jobs=1)
    points = measure_ticks(engine, 8)
    assert [count for count, _ in points] == [1, 2, 4, 8]
    assert all(0 < seconds < 5 for _, seconds in points)
    assert len(engine._free_rows) == 8


def test_as_many_rounds_are_measured_as_asked() -> None:
    engine = FakeEngine()
    measure_ticks(engine, 4, Clock(engine), rounds=1)
    assert len(engine.batches) == 3 * TICKS


@pytest.mark.parametrize(("sampler", "num_timesteps"), [("heun", 2), ("heun", 5), ("plms", 4)])
def test_a_network_of_few_timesteps_is_measured_by_as_many_steps_as_its_sampler_takes(
    make_checkpoint: MakeCheckpoint, sampler: str, num_timesteps: int
) -> None:
    checkpoint = make_checkpoint(noise=NoiseConfig(num_train_timesteps=num_timesteps, default_sampler=sampler))
    executor = EagerExecutor(checkpoint.net, torch.device("cpu"), sizes=(1,))
    engine = Engine(checkpoint, executor, torch.device("cpu"), max_rows=8, max_jobs=4)
    assert [places for places, _ in measure_ticks(engine, 2, rounds=1)] == [1, 2]
