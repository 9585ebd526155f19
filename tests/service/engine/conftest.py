"""A checkpoint of one's own, measurements that take no time, forward passes counted, exact float32 on a GPU."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.engines import OnGpu
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import autotune, pictures


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Engine.images return x itself instead of rounding it to bytes."""
    monkeypatch.setattr(pictures, "to_uint8", lambda x: x)


@pytest.fixture
def on_gpu(make_checkpoint: MakeCheckpoint) -> Iterator[OnGpu]:
    """A checkpoint of its own, as an engine moves the net; and the exact float32 that the comparison needs."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield lambda **fields: (make_checkpoint(**fields), torch.device("cuda"))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """One of its own: an executor may change the layout of its net."""
    return make_checkpoint()


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measure by one call each, and count."""
    calls: list[int] = []

    def seconds(_builder: object, call: Callable[[], object]) -> float:
        calls.append(1)
        call()
        return 0.01

    monkeypatch.setattr(autotune.Builder, "time", seconds)
    return calls


@pytest.fixture
def unmeasurable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def fail(*_args: object) -> float:
            raise AssertionError("it was to be known already")

        monkeypatch.setattr(autotune.Builder, "time", fail)
        monkeypatch.setattr(autotune, "_try", fail)

    return forbid
