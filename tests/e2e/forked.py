"""`tminus` in processes that are forked from one which has imported it: importing torch takes longer than serving.

From `main` on they are what the command is, with arguments, environment and output of their own. That the command
itself starts is tested where it is given in a shell: the pages, the refusals of a start, the bench.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TextIO

PRELOADED = (
    "service.cli.main",
    "service.app",
    "service.server",
    "service.jobs.sqlite_store",
    "service.engine.loading",
    "openvino.frontend.pytorch.patch_model",  # what converting a network imports
    "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.tensor",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Forked:
    """A process as subprocess.Popen shows it; `output` is what it prints, on both channels."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        reader, writer = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(tuple(arguments), dict(env), writer))
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

    def wait(self, timeout_s: float) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("tminus", timeout_s)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: Sequence[str], env: Mapping[str, str], output: Connection) -> None:
    """In the new process: become the command."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["tminus", *arguments]
    from service.cli.main import main

    main()
