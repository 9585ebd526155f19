"""Two ticks in flight: the bits of each job alone, and what a pass that fails leaves behind."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.service.engine.edits import edit, half_mask, picture
from tests.service.engine.engines import CPU, MIXED, Floats, Job, make_engine, spec_of, together
from tests.service.engine.exact import needs_openvino, rows_of
from tests.service.fakes import INFO, FakeEngine
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import loading, openvino_executor, row_state
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor
from tminus.service.engine.loading import LONG_FULL_TICK_S, measure_overlap
from tminus.service.engine.openvino_executor import Graph, OpenVINOExecutor
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Inputs
from tminus.service.work import Batch, work_of

pytestmark = pytest.mark.slow

MAX_ROWS = 12  # that the engine holds at once
JOBS: tuple[Job, ...] = (
    *((spec, None) for spec in MIXED),
    edit(Inputs(picture(1), half_mask(1)), n=2, steps=9, seed=31),
    edit(Inputs(picture(2), half_mask(2)), n=1, steps=8, seed=32, sampler="unipc", guidance=2.0),
    edit(Inputs(picture(3)), n=2, steps=12, seed=33, sampler="heun", strength=0.6),
)


def openvino(
    checkpoint: Checkpoint, sizes: Sequence[int] = (1, 2), streams: int = 2, wide: int = 1
) -> OpenVINOExecutor:
    graph = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps)
    return OpenVINOExecutor(graph, sizes=sizes, threads=streams, wide=wide)


def overlapping(engine: Engine, jobs: Sequence[Job], rng: random.Random) -> dict[int, Floats]:
    """The latents of those jobs that were not cancelled, which come at any time and of which two ticks are in flight.

    A job that comes may have the slots of one that has gone while ticks of others are in flight.
    """
    scheduler, order = Scheduler(BatchPolicy.of(rng.choice([2, 5, 7]))), list(range(len(jobs)))
    rng.shuffle(order)
    rows: dict[str, tuple[int, ...]] = {}
    latents: dict[int, Floats] = {}
    in_flight: deque[tuple[Batch, Callable[[], None]]] = deque()

    def end() -> None:
        batch, finish = in_flight.popleft()
        finish()
        for name in scheduler.advance(batch).finished:
            latents[int(name)] = engine.latents(rows[name])
            engine.remove(rows.pop(name))

    while order or rows:
        does = rng.choice(["come", "begin", "begin", "begin", "end", "end", "leave"])
        if does == "come" and order and sum(map(len, rows.values())) <= MAX_ROWS - 3:
            k = order.pop()
            spec, inputs = jobs[k]
            rows[str(k)] = engine.add(spec, inputs=inputs)
            scheduler.add(str(k), rows[str(k)], work_of(spec, engine.info))
        if does == "begin" and (batch := scheduler.next_batch()) is not None:
            in_flight.append((batch, engine.begin(batch)))
            scheduler.begin(batch)
        if does == "end" and in_flight:
            end()
        if does == "leave" and rows and rng.random() < 0.02:
            name = rng.choice(list(rows))
            while any(name == picked.job_id for batch, _ in in_flight for picked in batch.jobs):
                end()
            if name in rows:
                scheduler.cancel(name)
                engine.remove(rows.pop(name))
    assert not in_flight
    return latents


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda tiny: EagerExecutor(tiny.net, CPU, sizes=(1,)), marks=pytest.mark.long), openvino],
    ids=["eager", "openvino"],
)
@needs_openvino
def test_any_mix_with_two_ticks_in_flight_has_the_bits_of_each_job_alone(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, make: Callable[[Checkpoint], Executor]
) -> None:
    executor = make(tiny)
    own = [together(make_engine(tiny, executor=executor), [job], max_batch=16, read=Engine.latents)[0] for job in JOBS]
    monkeypatch.setattr(Scheduler, "overlaps", True)
    monkeypatch.setattr(row_state, "FIRST_LINES", 8)  # so that plans move while ticks are in flight

    @settings(max_examples=5, deadline=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        engine = make_engine(tiny, executor=executor, max_rows=MAX_ROWS)
        for k, latents in overlapping(engine, JOBS, random.Random(seed)).items():
            assert latents.tobytes() == own[k].tobytes(), JOBS[k]

    check()


# --- what a pass that fails leaves behind ---


@pytest.fixture
def executor(tiny: Checkpoint) -> OpenVINOExecutor:
    return openvino(tiny)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All that are made."""
    compiled, made = pytest.importorskip("openvino").CompiledModel, list[object]()
    create = compiled.create_infer_request

    def note(self: object) -> object:
        made.append(create(self))
        return made[-1]

    monkeypatch.setattr(compiled, "create_infer_request", note)
    return made


def breaking(monkeypatch: pytest.MonkeyPatch, at: int, when: str) -> None:
    """Have the pass that begins as the so-manieth fail, as it begins or as it is waited for."""
    begin, calls = openvino_executor._Pass.start, count()

    def start(self: openvino_executor._Pass, *given: object) -> None:
        broken = next(calls) == at
        if broken and when == "start":
            raise RuntimeError("a stream died")
        begin(self, *given)  # type: ignore[arg-type]
        if broken:
            wait = self.wait

            def fail() -> None:
                self.wait = wait
                raise RuntimeError("a stream died")

            self.wait = fail

    monkeypatch.setattr(openvino_executor._Pass, "start", start)


@needs_openvino
@pytest.mark.parametrize("when", ["start", "finish"])
def test_a_pass_that_fails_fails_its_own_batch_and_leaves_the_executor_as_it_was(
    tiny: Checkpoint, executor: OpenVINOExecutor, requests: list[object], when: str
) -> None:
    inputs = example_inputs(tiny, CPU, 13)
    halves = [rows_of(inputs, range(7)), rows_of(inputs, range(7, 13))]
    expected = [executor(*half).clone() for half in halves]
    failures = at = 0
    while at == failures:
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, at, when)
            begun: list[Callable[[], Tensor] | None] = []
            found: list[Tensor | None] = []
            for half in halves:
                try:
                    begun.append(executor.start(*half))
                except RuntimeError:
                    begun.append(None)
            for finish in begun:
                try:
                    found.append(None if finish is None else finish())
                except RuntimeError:
                    found.append(None)
        failures += found.count(None)
        at += 1
        assert all(out is None or out.equal(right) for out, right in zip(found, expected, strict=True))
        made = len(requests)
        assert [executor(*half).equal(right) for half, right in zip(halves, expected, strict=True)] == [True, True]
        assert len(requests) == made, "each is free again"
    assert failures >= 6


@needs_openvino
def test_there_are_no_more_requests_than_were_running_at_once(
    tiny: Checkpoint, executor: OpenVINOExecutor, requests: list[object]
) -> None:
    inputs = example_inputs(tiny, CPU, 8)
    for _ in range(5):
        for finish in [executor.start(*inputs), executor.start(*inputs)]:
            finish()
        executor(*inputs)
    assert len(requests) <= 2 * 4 + 2


@needs_openvino
def test_a_tick_that_fails_once_its_passes_have_begun_lets_them_end(
    tiny: Checkpoint, executor: OpenVINOExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no memory is left for the noise."""
    engine, spec = make_engine(tiny, executor=executor), spec_of(n=3, steps=4)
    (own,) = together(engine, [spec], max_batch=8, read=Engine.latents)
    rows, others = engine.add(spec), engine.add(spec_of(n=2, steps=4, seed=9))
    finish = engine.begin(Batch(rows, (0,) * 3, ()))
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._noises), "draw", lambda *_: torch.zeros(1)[7])
        with pytest.raises(IndexError):
            engine.begin(Batch(others, (0, 0), ()))
    finish()
    for step in range(1, 4):
        engine.step(Batch(rows, (step,) * 3, ()))
    assert engine.latents(rows).tobytes() == own.tobytes()


# --- how much shorter a tick is beside another ---


@pytest.mark.parametrize(("took_s", "share"), [(0.006, 0.6), (0.02, 1.0)])
def test_the_share_of_a_tick_s_time_beside_another_is_measured_with_two_in_flight(took_s: float, share: float) -> None:
    engine, in_flight, now_s = FakeEngine(INFO), set[int](), [0.0]
    engine.queues = True

    def step(_batch: Batch) -> None:
        in_flight.add(len(engine.in_flight))
        now_s[0] += took_s

    engine.on_step = step
    assert measure_overlap(engine, 4, 0.01, lambda: now_s[0]) == share
    assert in_flight == {1, 2}
    assert engine.jobs == {}


def test_it_is_not_measured_without_a_queue_and_where_a_tick_is_long() -> None:
    engine = FakeEngine(INFO)
    assert measure_overlap(engine, 4, 0.01) is None
    engine.queues = True
    assert measure_overlap(engine, 4, 1.01 * LONG_FULL_TICK_S) is None
    assert engine.batches == []


def test_a_queue_s_full_tick_has_eight_places_where_fewer_would_do() -> None:
    times = ((1, 0.001), (2, 0.0017), (4, 0.003), (8, 0.006))
    assert loading._batch_sizes(times, queues=True) == {"max_batch": 8, "short_batch": 1}
    assert loading._batch_sizes(times, queues=False) == {"max_batch": 4, "short_batch": 1}
