"""`tminus` in processes that are forked from one which has imported it: importing torch takes longer than serving.

From `main` on they are what the command is, with arguments, environment and output of their own. That the command
itself starts is tested where it is given in a shell: the pages, the refusals of a start, the bench.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from tests.trials.injected import pace

PRELOADED = (
    "tminus.service.cli.main",
    "tminus.service.startup.serve",
    "tminus.service.jobs.store.sqlite_store",
    "tminus.service.engine.loading",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Forked:
    """A process as subprocess.Popen shows it; `output` is what it prints, on both channels.

    prepare: is called in it before the command runs.
    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], prepare: Callable[[], None] | None = None
    ) -> None:
        reader, writer = _context.Pipe(duplex=False)
        self.between_ticks_s = _context.RawValue("d", 0.0)  # see tests.trials.injected.pace
        given = tuple(arguments), dict(env), writer, prepare, self.between_ticks_s
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        writer.close()
        self.output: TextIO = os.fdopen(os.dup(reader.fileno()), "r", encoding="utf-8")
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float = 600.0) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("tminus", timeout_s)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which is told a moment later
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], env: Mapping[str, str], folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. What it prints goes through two files in a folder of its own."""
    files = [folder / "stdout", folder / "stderr"]
    process = _context.Process(target=_run_into, args=(tuple(arguments), dict(env), files))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired("tminus", timeout_s)
    out, err = (file.read_text("utf-8") for file in files)
    return subprocess.CompletedProcess(["tminus", *arguments], process.exitcode, out, err)


def _run_into(arguments: Sequence[str], env: Mapping[str, str], files: Sequence[Path]) -> None:
    with files[0].open("wb") as out, files[1].open("wb") as err:
        _become(arguments, env, out.fileno(), err.fileno())


def _run(
    arguments: Sequence[str],
    env: Mapping[str, str],
    output: Connection,
    prepare: Callable[[], None] | None,
    between_ticks_s: Any,
) -> None:
    with output:
        pace(between_ticks_s)
        if prepare is not None:
            prepare()
        _become(arguments, env, output.fileno(), output.fileno())


def _become(arguments: Sequence[str], env: Mapping[str, str], out: int, err: int) -> None:
    """In the new process: be the command."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(env)
    if threads := env.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))  # which it has read the variable for already
    sys.argv = ["tminus", *arguments]
    from tminus.service.cli.main import main

    main()
