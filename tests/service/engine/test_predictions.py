"""What a network predicts costs nothing: models of every prediction take one pass a tick, and as many operations."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tminus.model.catalogue import SAMPLERS
from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.service.engine.engine import Engine
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import trial_spec
from tminus.service.work import work_of

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "EDM": "edm", "flow": "flow"}
CPU, ROWS = torch.device("cpu"), 64


class Counted:
    """An executor whose pass takes no time, and that counts its passes."""

    name, precision, details, queues = "counted", "float32", "", False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._out = torch.zeros(ROWS, checkpoint.net.config.out_channels, *checkpoint.row_shape[1:])
        self.passes = 0

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        self.passes += 1
        return self._out.narrow(0, 0, len(x))

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        out = self(x, t, class_labels)
        return lambda: out


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_rows_of_every_prediction_take_one_pass_a_tick_and_as_many_operations(checkpoint: Checkpoint) -> None:
    """A model whose network is given a scaled x has three more in all: what multiplies x is gathered and shaped too."""
    steps = checkpoint.noise.num_train_timesteps
    found = {
        name: most_in_a_tick(replace(checkpoint, tables=(), recommended=None, noise=noise))
        for name, kind in PREDICTIONS.items()
        if (noise := NoiseConfig(num_train_timesteps=steps, default_sampler="euler", prediction_type=kind))
    }
    assert {passes for passes, _ in found.values()} == {1}
    assert found["v"] == found["eps"]
    assert found["EDM"][1] == found["eps"][1] + 3


def most_in_a_tick(checkpoint: Checkpoint) -> tuple[int, int]:
    """Put a job of every sampler, and a guided one, in shared ticks; the most passes and operations that a tick has."""
    executor = Counted(checkpoint)
    engine = Engine(checkpoint, executor, CPU, max_rows=ROWS, max_jobs=ROWS)
    scheduler, most = Scheduler(BatchPolicy.of(ROWS)), (0, 0)
    for k, sampler in enumerate(name for name in engine.info.samplers if name in SAMPLERS):
        guidance = 2.0 if k == 0 and engine.info.null_class is not None else 1.0
        spec = trial_spec(engine.info, 1, 4 + k, sampler=sampler, seed=k, guidance=guidance)
        with suppress(ValueError):  # some cannot start where there is no signal
            scheduler.add(str(k), engine.add(spec), work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        executor.passes = 0
        with Operations() as operations:  # type: ignore[no-untyped-call]
            engine.step(batch)
        engine.wait()
        most = max(most[0], executor.passes), max(most[1], operations.count)
        scheduler.advance(batch)
    return most
