import ctypes
import faulthandler
import functools
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx._transports.default as transport
import hypothesis
import psutil
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # torch reads it as it is imported: waiting threads leave the cores to others
    os.environ["OMP_WAIT_POLICY"] = "passive"
import torch

from tests import tools

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has one core: two teams of threads would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers that it starts

# httpx makes a TLS context for each httpx.get, in five times what the request takes.
transport.create_ssl_context = functools.cache(transport.create_ssl_context)

hypothesis.settings.register_profile("tminus", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("tminus")

# A process that loses its parent becomes a child of this one, not of init: so all that tests have started is found.
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
END_S = 60.0  # of a test process, when its tests are over

signal.signal(signal.SIGTERM, signal.default_int_handler)  # or nobody would end what it has started


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """End the processes that tests have left, and this one.

    Python waits at its exit for the children of multiprocessing and for threads, and a thread may read what a process
    prints: a server that a failed test leaves would hold the whole run.
    """
    # A thread may wait for something else, for ever. Then this says where it waits, and fails the run.
    faulthandler.dump_traceback_later(END_S, exit=True, file=sys.__stderr__)
    while left := living_descendants():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


def living_descendants() -> list[psutil.Process]:
    """The processes below this one. Those that have ended are left for whoever waits for them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say what a worker died of, which its report does not: a status below 0 is a signal, -9 perhaps want of memory."""
    if error is not None:
        with suppress(subprocess.TimeoutExpired):  # it lives, and has closed its pipe
            print(f"\n{node.gateway.id} ended with status {node.gateway._io.popen.wait(timeout=10)}", flush=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say last what is to be installed, in one line."""
    lacked = [report for report in terminalreporter.stats.get("skipped", ()) if tools.MISSING in report.longrepr[2]]
    for report in lacked:  # so that pytest tells of each tool once
        report.longrepr = (tools.__file__, 0, report.longrepr[2])
    yield
    if packages := sorted({report.longrepr[2].rpartition(" ")[2] for report in lacked}):
        what = f"tests skipped for want of tools: {len(lacked)}; apt-get install {' '.join(packages)}"
        terminalreporter.write_line(what, yellow=True)


# Longest first.
LONG = [
    "tests/test_trials.py",
    *(f"tests/e2e/test_{name}.py" for name in ("pages", "production", "replicas", "page", "exact", "ray", "models")),
    "tests/test_bench.py",
]


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`--dist worksteal` cuts the list in a part for each worker, which begins with its share of what takes long.

    Whoever is done steals from the end of another's part.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    # One worker has all that ask the server of the bundled checkpoint, which takes ten seconds of a core to start.
    at_one_server: list[pytest.Item] = []
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        if workers and "bundled_server" in getattr(item, "fixturenames", ()):
            at_one_server.append(item)
        else:
            modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    others = [name for name in modules if name.startswith("tests/e2e/") and name not in LONG]
    slow = [*(name for name in LONG if name in modules), *others]
    parts = [[item for name in slow[k::workers] for item in modules.pop(name)] for k in range(workers)]
    if parts:
        parts[0] = at_one_server + parts[0]
    quick = [item for module in modules.values() for item in module]
    dealt: list[pytest.Item] = []
    for k, part in enumerate(parts):
        room = max(0, (len(items) - len(dealt)) // (workers - k) - len(part))
        dealt += part + quick[:room]
        del quick[:room]
    items[:] = dealt + quick


def pytest_collection_finish() -> None:
    """What has been imported stays: looking through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
