"""Faults that a test cannot order from outside: put into a server's process before it starts, each waits for a file.

What is replaced is the call that would fail: a tick of the engine, the allocation of a job's rows, the worker's own
code. Everything around it is the server's.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal

Fault = Literal["step", "memory of a step", "memory of a job", "worker", "death", "hang"]
DEADLY_SEED = 666  # of the jobs whose steps end the process or hang, as long as the file is there
STALL_S = 3.0  # of a server whose steps hang: a trial does not wait for a minute


def inject(fault: Fault, trigger: Path) -> None:
    """Have a fault happen once, when the file is there; it is deleted as it happens, but for `death` and `hang`."""
    import torch

    from tminus.service import threads
    from tminus.service.engine.engine import Engine
    from tminus.service.scheduling.scheduler import Scheduler

    if fault == "death":
        make_deadly(Engine, trigger, lambda: ctypes.string_at(0))  # reads where no memory is: a SIGSEGV
        return
    if fault == "hang":
        threads.STALL_S = STALL_S
        make_deadly(Engine, trigger, threading.Event().wait)
        return
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    owner, name, error = {
        "step": (Engine, "begin", RuntimeError("a kernel failed")),
        "memory of a step": (Engine, "begin", out_of_memory),
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


def hang(where: Literal["event loop", "encoder"], trigger: Path, known_after_s: float) -> None:
    """Have /readyz, or an image, hang as long as the file is there. known_after_s: when a hang is taken for one."""
    from tminus.service import threads
    from tminus.service.api import system
    from tminus.service.images import encoder

    owner, name = {"event loop": (system, "why_unready"), "encoder": (encoder, "encode_png")}[where]
    call = getattr(owner, name)

    @wraps(call)
    def instead(*arguments: Any) -> Any:
        while trigger.exists():
            time.sleep(0.02)
        return call(*arguments)

    setattr(owner, name, instead)
    threads.STALL_S = known_after_s


def make_deadly(engine: Any, trigger: Path, act: Callable[[], object]) -> None:
    """Have the steps of the jobs of one seed do something, in the thread that steps."""
    add, begin, deadly = engine.add, engine.begin, set[int]()

    def add_and_look(self: Any, spec: Any, *more: Any) -> Any:
        rows = add(self, spec, *more)
        if spec.seed == DEADLY_SEED:
            deadly.update(rows)
        return rows

    def begin_or_die(self: Any, batch: Any) -> Any:
        if not deadly.isdisjoint(batch.rows) and trigger.exists():
            act()
        return begin(self, batch)

    engine.add, engine.begin = add_and_look, begin_or_die


def pace(between_ticks_s: Any) -> None:
    """Have a tick begin only so long after another: the value may be changed at any time by who shares its memory.

    Between two ticks the worker does what it is told, as ever: jobs come, are cancelled, and are written down.
    """
    from tminus.service.worker.loop import Loop

    tick, last_s = Loop.tick, 0.0

    def instead(loop: Loop) -> bool:
        nonlocal last_s
        wait_s = last_s + between_ticks_s.value - time.monotonic()
        if between_ticks_s.value and wait_s > 0:
            time.sleep(min(wait_s, 0.005))
            return loop.ticks.has_next
        last_s = time.monotonic()
        return tick(loop)

    Loop.tick = instead  # type: ignore[method-assign]
