import functools
import gc
import os
import subprocess
from contextlib import suppress
from typing import Any

import httpx._transports.default as transport
import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has one core: two teams of threads would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers that it starts

# httpx makes a TLS context for each httpx.get, in five times what the request takes.
transport.create_ssl_context = functools.cache(transport.create_ssl_context)

hypothesis.settings.register_profile("tminus", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("tminus")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say what a worker died of, which its report does not: a status below 0 is a signal, -9 perhaps want of memory."""
    if error is not None:
        with suppress(subprocess.TimeoutExpired):  # it lives, and has closed its pipe
            print(f"\n{node.gateway.id} ended with status {node.gateway._io.popen.wait(timeout=10)}", flush=True)


# Longest first.
LONG = [
    "tests/test_trials.py",
    *(f"tests/e2e/test_{name}.py" for name in ("pages", "replicas", "page", "exact", "ray", "models")),
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
