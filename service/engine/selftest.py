"""Tests that an image has the same bits alone and under load, and caches the result for later starts.

Two properties are tested. First, the network's output for a row does not depend on the other rows of the pass, nor on
the row's position. Second, for every sampler, the engine's update of a row does not depend on other rows. The second
test replaces the network with a simple function.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.autotune import AGREE_ROWS, agree_rows, example_inputs
from tminus.service.engine.choice_cache import ChoiceCache
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import Executor, probe_bits
from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Floats, SampleSpec, trial_spec
from tminus.service.work import work_of

log = logging.getLogger(__name__)

PROBE_ROWS = 2  # number of rows to hash for the fingerprint; a small network may need more, see `probe_rows`
SPARE_ROWS, SPARE_JOBS = 64, 16  # the self-test and the measurement of ticks need this many
# The test runs every sampler for at most STEPS steps. It runs the first GUIDED samplers with at least ROWS rows, and
# again with guidance.
STEPS, ROWS, GUIDED = 4, 2, 3


class Proof:
    """Tests that an exact executor gives a row the same bits in any batch, and caches the findings.

    The cache key depends on weights, machine and versions. Findings are reused only if the executor's output has the
    same hash as before. This reveals a cache file that was changed or comes from another machine.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        executor: Executor,
        how: Mapping[str, Any],
        cache: Path | None,
    ) -> None:
        # Leave out the autoencoder: it would stay in memory until the tests end.
        self._checkpoint = replace(checkpoint, autoencoder=None, size_px=checkpoint.row_shape[1:])
        self._device, self._executor = device, executor
        how_it_runs = f"executor {executor.name} {executor.precision} ({executor.details})"
        self._finding = f"{how_it_runs} does not give the same bits alone and among others here"
        what = {**how, "weights": checkpoint.weights_hash, "details": executor.details, "tminus": version("tminus")}
        self._cache = ChoiceCache(cache, checkpoint, device, what, ())
        rows = probe_rows(checkpoint, executor.precision)
        # If a few rows may agree by chance although the bits differ, hash all rows. Only small networks need this.
        row = probe_bits(executor, example_inputs(checkpoint, device, 1 if rows == PROBE_ROWS else rows))
        kept = self._cache.read() or {}
        bits = kept.get("bits")
        if kept.get("row") != row or not isinstance(bits, str):
            kept, bits = {}, probe_bits(executor, example_inputs(checkpoint, device, rows))
        self.bits: str = bits
        self.begun = "exact" in kept  # True if an earlier start has already run some of the tests
        self._earlier, self._max_batch = kept.get("exact"), kept.get("max_batch")
        self._kept = {"row": row, "bits": bits}

    def test(self, engine: Engine, max_batch: int, inexact: ModelInfo, seconds: float) -> Iterator[None]:
        """Run tests for about `seconds`, and return an iterator that runs the rest. Raises ValueError if bits differ.

        inexact: becomes the engine's info if a test in the iterator fails.
        """
        if self._earlier is False:
            raise ValueError(f"{self._failed()}; found before, and tested again without {self._cache.found}")
        if self._earlier is True and type(self._max_batch) is int and self._max_batch >= max_batch:
            log.info("the bits were tested at an earlier start")
            return iter(())
        self._max_batch = max_batch
        tests = network_keeps_rows_apart(self._executor, self._checkpoint, self._device, max_batch)
        if self.begun:
            log.info("some bits were tested at an earlier start, the rest are while no job runs")
            return self._later(tests, engine, inexact)
        if not samplers_keep_rows_apart(self._checkpoint, self._device, max_batch):
            raise self._failed()
        until_s = time.monotonic() + seconds
        count = 0
        for same in tests:
            if same is None:
                continue
            count += 1
            if not same:
                self._keep(exact=False)
                raise self._failed()
            if time.monotonic() > until_s:
                break
        else:
            self._keep(exact=True)
            log.info("a row has the same bits alone and among others: %d batches tested", count)
            return iter(())
        self._keep(exact=None)
        log.info("a row has the same bits alone and among others: %d batches tested, the rest while no job runs", count)
        return self._later(tests, engine, inexact)

    def _later(self, tests: Iterator[bool | None], engine: Engine, inexact: ModelInfo) -> Iterator[None]:
        for same in tests:
            if same is False:
                self._keep(exact=False)
                engine.info = replace(inexact, name=engine.info.name)
                log.error("%s: from now on it serves without that promise", self._finding)
                return
            yield
        self._keep(exact=True)
        log.info("a row has the same bits alone and among others: all batches tested")

    def _keep(self, *, exact: bool | None) -> None:
        self._cache.write(self._kept | {"exact": exact, "max_batch": self._max_batch})

    def _failed(self) -> ValueError:
        return ValueError(f"{self._finding}; --no-exact serves without that promise")


def network_keeps_rows_apart(
    executor: Executor, checkpoint: Checkpoint, device: torch.device, max_batch: int
) -> Iterator[bool | None]:
    """Run batches of 2 to max_batch rows. Yield for each batch whether its rows have the same bits as alone.

    Small batches and the largest come first, because they reveal most differences. Yield None after each row that is
    run alone, so that a new job waits for one batch at most.
    """
    rows = max(agree_rows(checkpoint, executor.precision), max_batch)
    x, t, labels = example_inputs(checkpoint, device, rows)
    if checkpoint.fractional:
        t[1::4] += 0.5
    alone: dict[int, bytes] = {}

    def run(index: Sequence[int]) -> list[bytes]:
        picked = list(index)
        out = executor(x[picked], t[picked], labels[picked] if labels is not None else None)
        return [each.numpy().tobytes() for each in out.cpu()]

    first = 0
    for places in dict.fromkeys([2, 3, max_batch, *range(4, max_batch)]):
        index = [(first + place) % rows for place in range(places)]
        first += places - 1  # the next batch has each row in another position, beside other rows
        for row in index:
            if row not in alone:
                (alone[row],) = run([row])
                yield None
        yield run(index) == [alone[row] for row in index]


class _Standin:
    """Replaces the network with a function of row, timestep and class, whose bits do not depend on the batch."""

    name, precision, details, queues = "stand-in", "float32", "", False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._repeats = checkpoint.net.config.out_channels // checkpoint.net.config.in_channels

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        numbers = t.tolist(), class_labels.tolist() if class_labels is not None else [0] * len(t)
        factors = [math.sin(1 + 0.01 * when + label) for when, label in zip(*numbers, strict=True)]
        out = x * torch.tensor(factors, dtype=torch.float32).to(x.device)[:, None, None, None]
        return out.repeat(1, self._repeats, 1, 1)

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        out = self(x, t, class_labels)
        return lambda: out


def samplers_keep_rows_apart(checkpoint: Checkpoint, device: torch.device, max_batch: int) -> bool:
    """Run jobs of every sampler on `_Standin`. Return whether all latents have the same bits alone and together."""
    engine = Engine(checkpoint, _Standin(checkpoint), device, max_rows=SPARE_ROWS, max_jobs=SPARE_JOBS)
    return same_alone_and_together(engine, max_batch)


def same_alone_and_together(engine: RowEngine, max_batch: int) -> bool:
    """Run jobs of every sampler alone, then in shared ticks. Return whether all latents have the same bits."""
    specs = _possible(engine, _specs(engine.info))
    alone = [_run(engine, [spec], max_batch)[0] for spec in specs]
    together = _run(engine, specs, max_batch)
    return all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


def _specs(model: ModelInfo) -> list[SampleSpec]:
    """Return jobs for every sampler, with various step counts. See GUIDED for jobs with several rows or guidance."""
    specs = []
    for k, sampler in enumerate(model.samplers):
        steps = min(STEPS, SAMPLER_FACTS[sampler].max_steps(model.num_timesteps))
        first = k < GUIDED
        specs.append(
            trial_spec(model, n=ROWS + k if first else 1, steps=max(1, steps - k % 3), sampler=sampler, seed=k)
        )
        if first and model.null_class is not None:
            specs.append(trial_spec(model, n=1 + k, steps=steps, sampler=sampler, seed=k + 100, guidance=2.0))
    return specs


def _possible(engine: RowEngine, specs: Sequence[SampleSpec]) -> list[SampleSpec]:
    """Return the jobs that the noise schedule allows. Some samplers cannot start at a timestep without signal."""
    possible = []
    for spec in specs:
        with suppress(ValueError):
            engine.plan(spec)
            possible.append(spec)
    return possible


def _run(engine: RowEngine, specs: list[SampleSpec], max_batch: int) -> list[Floats]:
    scheduler = Scheduler(BatchPolicy.of(max(2, max_batch)))
    rows = [engine.add(spec) for spec in specs]
    for k, spec in enumerate(specs):
        scheduler.add(str(k), rows[k], work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        scheduler.advance(batch)
    latents = [engine.latents(each) for each in rows]
    for each in rows:
        engine.remove(each)
    return latents


def probe_rows(checkpoint: Checkpoint, precision: str) -> int:
    """Return the number of rows to hash for the fingerprint: PROBE_ROWS, or more for a small network.

    Below float32, two builds with different bits may agree on two rows of a small network by chance, see `agree_rows`.
    For larger networks, two rows are enough. Hashing more would change every fingerprint.
    """
    rows = agree_rows(checkpoint, precision)
    return rows if rows > AGREE_ROWS else PROBE_ROWS
