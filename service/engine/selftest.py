"""Test that an image has the same bits alone and under load, and keep what was found for later starts.

That is so if two things hold. The network computes a row's output the same way whatever else is in the pass, wherever
it stands there. And the engine's update of a row, whichever its sampler is, reads nothing of another row. The first is
tested on the network, and takes passes; the second needs no network.
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

PROBE_ROWS = 2  # that the fingerprint hashes, unless a small network needs more, see probe_rows
SPARE_ROWS, SPARE_JOBS = 64, 16  # the least that the self-test and the measurement need
# The test of the samplers: jobs of every sampler with STEPS steps. This number of samplers run guided too.
STEPS, ROWS, GUIDED = 4, 2, 3


class Proof:
    """What is known of an exact executor's bits on this machine, and what is kept of that for later starts.

    It is kept by the weights, the machine and the versions. If the executor's output is what it was, all that
    was found out then is taken to hold; so a file of the cache that was changed, or is of another machine, is noticed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        executor: Executor,
        how: Mapping[str, Any],
        cache: Path | None,
    ) -> None:
        # Without the autoencoder, which would be held until all is tested.
        self._checkpoint = replace(checkpoint, autoencoder=None, size_px=checkpoint.row_shape[1:])
        self._device, self._executor = device, executor
        how_it_runs = f"executor {executor.name} {executor.precision} ({executor.details})"
        self._finding = f"{how_it_runs} does not give the same bits alone and among others here"
        what = {**how, "weights": checkpoint.weights_hash, "details": executor.details, "tminus": version("tminus")}
        self._cache = ChoiceCache(cache, checkpoint, device, what, ())
        rows = probe_rows(checkpoint, executor.precision)
        # Where other bits may agree on a few rows by chance, all are compared: such a network is small.
        row = probe_bits(executor, example_inputs(checkpoint, device, 1 if rows == PROBE_ROWS else rows))
        kept = self._cache.read() or {}
        bits = kept.get("bits")
        if kept.get("row") != row or not isinstance(bits, str):
            kept, bits = {}, probe_bits(executor, example_inputs(checkpoint, device, rows))
        self.bits: str = bits
        self.begun = "exact" in kept  # whether an earlier start has tested at least some
        self._earlier, self._max_batch = kept.get("exact"), kept.get("max_batch")
        self._kept = {"row": row, "bits": bits}

    def test(self, engine: Engine, max_batch: int, inexact: ModelInfo, seconds: float) -> Iterator[None]:
        """Test for a number of seconds. Returns the tests that are left. Raises ValueError where bits differ.

        inexact: what the engine tells from then on, should a test fail that is done later.
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
    """Run batches of 2 to max_batch rows; yields of each whether its rows have the bits that they have alone.

    The first batches are small ones and the largest, so that little time shows most. After a row alone it yields None,
    so that a job that has come meanwhile waits for one batch at most.
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
        first += places - 1  # so that a row stands at another place, beside others, next time
        for row in index:
            if row not in alone:
                (alone[row],) = run([row])
                yield None
        yield run(index) == [alone[row] for row in index]


class _Standin:
    """A function of a row, its timestep and its class, in place of a network: what it makes of a row is exact."""

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
    """Run a job of every sampler on a stand-in for the network; True if all bits agree alone and together."""
    engine = Engine(checkpoint, _Standin(checkpoint), device, max_rows=SPARE_ROWS, max_jobs=SPARE_JOBS)
    return same_alone_and_together(engine, max_batch)


def same_alone_and_together(engine: RowEngine, max_batch: int) -> bool:
    """Run a job of every sampler, each alone and then all in shared ticks; True if every latent agrees to the bit."""
    specs = _possible(engine, _specs(engine.info))
    alone = [_run(engine, [spec], max_batch)[0] for spec in specs]
    together = _run(engine, specs, max_batch)
    return all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


def _specs(model: ModelInfo) -> list[SampleSpec]:
    """Jobs of every sampler with different step counts, the first ones of several rows, and guided where that is so."""
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
    """Keep the jobs that the model's schedule allows: some samplers cannot start where there is no signal."""
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
    """The number of rows that the fingerprint hashes: 2, or the number that autotune compares if it is larger.

    Below float32 two builds with other bits may agree on two rows of a small network by chance, see `agree_rows`.
    For larger networks two rows are enough, and more would give every build another fingerprint.
    """
    rows = agree_rows(checkpoint, precision)
    return rows if rows > AGREE_ROWS else PROBE_ROWS
