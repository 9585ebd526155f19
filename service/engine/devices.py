"""Chooses a model's device, and manages its memory, copies to and from the host, and matmul precision."""

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
    """Return the device for auto, cpu, cuda or cuda:N. Raises ValueError if there is no such device."""
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
    """Return whether a GPU's context is dead, for example after an illegal memory access. Waits for the device.

    Every call on a dead context fails. A GPU that is only out of memory is not lost.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def default_max_rows(checkpoint: Checkpoint) -> int:
    """Return how many rows fit in LATENT_BUDGET_BYTES with x and x0 in float32, from 4 to MAX_DEFAULT_ROWS."""
    row_bytes = 2 * 4 * math.prod(checkpoint.row_shape)
    return max(4, min(MAX_DEFAULT_ROWS, LATENT_BUDGET_BYTES // row_bytes))


def available_bytes(device: torch.device) -> int | None:
    """Return the device's free memory; None if the system does not report it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()


def check_memory(needed_bytes: int, what: str, size_px: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError if the device has too little memory for one row of the model. size_px: (height, width)."""
    free = available_bytes(device)
    if free is not None and needed_bytes > free:
        raise ValueError(
            f"sample_size {size_px[0]}x{size_px[1]} of this {what} takes about {needed_bytes / GIB:.1f} GiB for one "
            f"image, and {free / GIB:.1f} GiB are free on {device}"
        )


def row_slots(max_rows: int, *shape: int, device: torch.device, dtype: type[np.generic] = np.float32) -> Tensor:
    """Return zeros [max_rows, *shape]. On a CPU, a slot takes no memory until it is used; most never are."""
    if device.type == "cuda":
        return torch.from_numpy(np.zeros(0, dtype)).to(device).new_zeros(max_rows, *shape)
    return torch.from_numpy(np.zeros((max_rows, *shape), dtype))


def release_memory() -> None:
    """Return freed memory to the operating system. Takes about 0.1 s."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory and has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to the device without waiting."""
    # torch.tensor copies the array. from_numpy would warn about a read-only array.
    return send(torch.tensor(array), device)


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """Copy row ids to the device without waiting. Returns int64 [len(rows)]."""
    return send(torch.tensor(rows), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_out(device: torch.device, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start copying tensors to the host. The returned function waits for the copies.

    On a CPU, nothing is copied: the function returns the tensors themselves, so no other code may modify them.
    """
    if device.type != "cuda":
        return lambda: tensors
    stream = streams(device).copying  # copies on this stream overlap with the next tick
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        for host, source in zip(on_host, tensors, strict=True):
            host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # otherwise the allocator may reuse the memory during the next tick
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(stream)

    def read() -> tuple[Tensor, ...]:
        copied.synchronize()
        return on_host

    return read


@dataclass(frozen=True, slots=True)
class Streams:
    """A GPU's streams for work that overlaps with ticks."""

    copying: torch.cuda.Stream
    decoding: torch.cuda.Stream
    capturing: torch.cuda.Stream
    """Work of another thread on this stream would break a CUDA graph."""


@cache
def streams(device: torch.device) -> Streams:
    """Return the streams of a GPU. They are created only once, because torch reuses a pool of just 32 streams."""
    return Streams(*(torch.cuda.Stream(device) for _ in range(3)))  # type: ignore[no-untyped-call]


class LaunchedTicks:
    """Tracks the ticks launched on a GPU, and which rows were finite after the last tick that ended.

    The flags are read one tick late, so that the host never waits for the tick that it has just launched.
    """

    def __init__(self) -> None:
        # For each tick that may still be running: an event at its end, and its flags on the host.
        self._running: list[tuple[torch.cuda.Event, Tensor]] = []
        self.num_launched = self.num_ended = 0
        self.finite: Tensor | None = None  # flags on the host, from the last tick that ended

    def add(self, finite: Tensor) -> None:
        """Record the end of the tick just launched, and start copying its flags to the host."""
        on_host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        on_host.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._running.append((event, on_host))
        self.num_launched += 1

    def wait(self) -> None:
        """Wait until at most one tick is running. That tick keeps the GPU busy while the host prepares the next one."""
        while len(self._running) > 1:
            event, self.finite = self._running.pop(0)
            event.synchronize()
            self.num_ended += 1


@dataclass
class _Flags:
    """Torch's two global TF32 flags, and the number of threads that rely on them."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    launching: int = 0  # number of threads that rely on the current values
    before: tuple[bool, bool] = (False, False)  # values to restore after the last of these threads

    def take(self, tf32: bool) -> None:
        """Set the flags. If other threads rely on a different value, wait for them first."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        with self.changed:
            self.changed.wait_for(lambda: not self.launching or matmul.allow_tf32 == tf32)
            if not self.launching:
                self.before = matmul.allow_tf32, cudnn.allow_tf32
                matmul.allow_tf32 = cudnn.allow_tf32 = tf32
            self.launching += 1

    def leave(self) -> None:
        """Restore the flags if no other thread relies on them."""
        with self.changed:
            self.launching -= 1
            if not self.launching:
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
                self.changed.notify_all()


_flags = _Flags()


@contextmanager
def multiplying(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 for float32 matmuls and convolutions in the `with` block. Does nothing on a CPU.

    Threads that want the same setting may run at the same time; other threads wait. The block may take a minute,
    because torch.compile may run in it. The previous setting is restored after the block. Work that was launched in the
    block keeps its precision. Nested blocks with different settings deadlock.
    """
    if device.type != "cuda":
        yield
        return
    _flags.take(tf32)
    try:
        yield
    finally:
        _flags.leave()
