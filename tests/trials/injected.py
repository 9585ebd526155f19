"""Faults that a test cannot order from outside: put into a server's process before it starts, each waits for a file.

What is replaced is the call that would fail: a step of the engine, the allocation of a job's rows, the worker's own
code. Everything around it is the server's.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal

Fault = Literal["step", "memory of a step", "memory of a job", "worker"]


def inject(fault: Fault, trigger: Path) -> None:
    """Have a fault happen once, when the file is there; it is deleted as it happens."""
    import torch

    from tminus.service.engine.engine import Engine
    from tminus.service.scheduling.scheduler import Scheduler

    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    owner, name, error = {
        "step": (Engine, "step", RuntimeError("a kernel failed")),
        "memory of a step": (Engine, "step", out_of_memory),
        "memory of a job": (Engine, "add", out_of_memory),
        "worker": (Scheduler, "next_batch", RuntimeError("a mistake of ours")),
    }[fault]
    setattr(owner, name, failing(getattr(owner, name), error, trigger))


def failing(call: Callable[..., Any], error: Exception, trigger: Path) -> Callable[..., Any]:
    @wraps(call)
    def instead(*arguments: Any, **options: Any) -> Any:
        if trigger.exists():
            trigger.unlink()
            raise error
        return call(*arguments, **options)

    return instead
