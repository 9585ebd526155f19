"""The device of a model: its choice, its memory, copies to and from it, and its matmul precision."""

import ctypes
import gc
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.machine import GIB, free_memory_bytes

LATENT_BUDGET_BYTES = 512 * 2**20
MAX_DEFAULT_ROWS = 4096


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device. Raises ValueError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def is_lost(device: torch.device) -> bool:
    """Whether a GPU's context is dead, as after an illegal access: then every call fails. Waits for the device.

    A GPU that ran out of memory is not lost.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def default_max_rows(checkpoint: Checkpoint) -> int:
    """Return the number of rows whose state (x and x0, float32) fits the latent budget."""
    row_bytes = 2 * 4 * math.prod(checkpoint.row_shape)
    return max(4, min(MAX_DEFAULT_ROWS, LATENT_BUDGET_BYTES // row_bytes))


def available_bytes(device: torch.device) -> int | None:
    """Return the free memory; None if the system does not report it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()


def check_memory(needed_bytes: int, what: str, size_px: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError if not even one row of the model fits. size_px: (height, width)."""
    free = available_bytes(device)
    if free is not None and needed_bytes > free:
        raise ValueError(
            f"sample_size {size_px[0]}x{size_px[1]} of this {what} takes about {needed_bytes / GIB:.1f} GiB for one "
            f"image, and {free / GIB:.1f} GiB are free on {device}"
        )


def row_slots(max_rows: int, *shape: int, device: torch.device, dtype: type[np.generic] = np.float32) -> Tensor:
    """Make zeros [max_rows, *shape]. On a CPU a slot takes memory only from its first use, and most are never used."""
    if device.type == "cuda":
        return torch.from_numpy(np.zeros(0, dtype)).to(device).new_zeros(max_rows, *shape)
    return torch.from_numpy(np.zeros((max_rows, *shape), dtype))


def release_memory() -> None:
    """Return a model's freed memory to the system. Takes about 0.1 s."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory and has this call
        ctypes.CDLL(None).malloc_trim(0)


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to the device without waiting."""
    # torch.tensor copies; from_numpy would warn about read-only arrays from a store.
    return send(torch.tensor(array), device)


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """Make an index [len(rows)] on the device without waiting."""
    return send(torch.tensor(rows), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_out(device: torch.device, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy new tensors to the host. The returned function waits for them; on a CPU it returns at once."""
    if device.type != "cuda":
        return lambda: tensors
    stream = streams(device).copying  # runs beside the next tick
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        for host, source in zip(on_host, tensors, strict=True):
            host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # otherwise the allocator would reuse its memory in the next tick
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(stream)

    def read() -> tuple[Tensor, ...]:
        copied.synchronize()
        return on_host

    return read


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of a GPU apart from the ticks' stream, one for each purpose."""

    copying: torch.cuda.Stream
    decoding: torch.cuda.Stream
    capturing: torch.cuda.Stream
    """Work of another thread on this stream would break a CUDA graph."""


@cache
def streams(device: torch.device) -> Streams:
    """Return the streams of a GPU, created once: torch has 32 streams and hands them out in turn."""
    return Streams(*(torch.cuda.Stream(device) for _ in range(3)))  # type: ignore[no-untyped-call]


class LaunchedTicks:
    """The ticks launched on a GPU, and the rows that were finite after the last tick known to have ended.

    The flags are read one tick late, so that the host never waits for the tick it has just launched.
    """

    def __init__(self) -> None:
        # For each tick not known to have ended: its event and its flags.
        self._running: list[tuple[torch.cuda.Event, Tensor]] = []
        self.num_launched = self.num_ended = 0
        self.finite: Tensor | None = None  # on the host, from the last tick known to have ended

    def add(self, finite: Tensor) -> None:
        """Record the end of the tick just launched, and start to copy its flags to the host."""
        on_host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        on_host.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._running.append((event, on_host))
        self.num_launched += 1

    def wait(self) -> None:
        """Wait until at most one tick has not ended: the GPU has work while the host prepares the next."""
        while len(self._running) > 1:
            event, self.finite = self._running.pop(0)
            event.synchronize()
            self.num_ended += 1


@dataclass
class _Flags:
    """The two flags, and the threads that launch with them."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    launching: int = 0  # threads that rely on the present values
    before: tuple[bool, bool] = (False, False)  # values before the first of these threads

    def take(self, tf32: bool) -> None:
        """Set the flags, or wait while other threads launch with other values."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        with self.changed:
            self.changed.wait_for(lambda: not self.launching or matmul.allow_tf32 == tf32)
            if not self.launching:
                self.before = matmul.allow_tf32, cudnn.allow_tf32
                matmul.allow_tf32 = cudnn.allow_tf32 = tf32
            self.launching += 1

    def leave(self) -> None:
        """Restore the flags, unless other threads still launch."""
        with self.changed:
            self.launching -= 1
            if not self.launching:
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
                self.changed.notify_all()


_flags = _Flags()


@contextmanager
def multiplying(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Launch float32 matmuls and convolutions in TF32 or not, whatever torch's defaults; does nothing on a CPU.

    Threads that want the same value may launch at the same time; others wait. (torch.compile, which may take a minute,
    is called in here too.) Launched work keeps its value after the block, which restores the flags. Do not nest blocks
    with different values.
    """
    if device.type != "cuda":
        yield
        return
    _flags.take(tf32)
    try:
        yield
    finally:
        _flags.leave()
