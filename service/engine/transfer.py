"""Copies between host and device, and the GPU ticks that have not ended. No tick waits for a copy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to the device, without waiting for it to arrive."""
    # torch.tensor copies; from_numpy would warn of arrays that were read from a store, which may not be written to.
    return send(torch.tensor(array), device)


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """Make an index [len(rows)] on the device, without waiting for it to arrive."""
    return send(torch.tensor(rows), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor of the host to the device, without waiting for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_out(device: torch.device, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy new tensors to the host; the function returned waits for them. On a CPU they are there already."""
    if device.type != "cuda":
        return lambda: tensors
    stream = streams(device).copying  # beside the next tick
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        for host, source in zip(on_host, tensors, strict=True):
            host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # or the allocator would give its memory to the next tick
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(stream)

    def read() -> tuple[Tensor, ...]:
        copied.synchronize()
        return on_host

    return read


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of a GPU beside the one of its ticks, one for each purpose."""

    copying: torch.cuda.Stream
    decoding: torch.cuda.Stream
    capturing: torch.cuda.Stream
    """What another thread put on this one would spoil a CUDA graph."""


@cache
def streams(device: torch.device) -> Streams:
    """The streams of a GPU, taken together and once: torch has 32, which it gives out in turn, the same again later."""
    return Streams(*(torch.cuda.Stream(device) for _ in range(3)))  # type: ignore[no-untyped-call]


class LaunchedTicks:
    """The ticks a GPU was given, and which rows were finite after the last one known to have ended.

    That is read one tick late, so that the host never waits for the tick it has just launched.
    """

    def __init__(self) -> None:
        # Owned here: an event and the flags of each tick that has not been seen to end.
        self._running: list[tuple[torch.cuda.Event, Tensor]] = []
        self.num_launched = self.num_ended = 0
        self.finite: Tensor | None = None  # on the host, after the last tick known to have ended

    def add(self, finite: Tensor) -> None:
        """Mark the end of the tick just launched, and start to copy its flags to the host."""
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
