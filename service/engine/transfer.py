"""What a GPU has done of the ticks it was given, read one tick late so that the host never holds it up."""

import torch
from torch import Tensor


class TickEvents:
    """Owns the events of ticks that have not been seen to end, and what the last of the others found."""

    def __init__(self) -> None:
        self._running: list[tuple[torch.cuda.Event, Tensor]] = []
        self.num_launched = self.num_ended = 0
        self.finite: Tensor | None = None  # on the host, of the last tick known to be over

    def launched(self, finite: Tensor) -> None:
        """Mark the end of the tick just launched, with a copy of its flags on the way to the host."""
        on_host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        on_host.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._running.append((event, on_host))
        self.num_launched += 1

    def wait(self, ahead: int = 1) -> None:
        """Wait until at most `ahead` ticks have not ended."""
        while len(self._running) > ahead:
            event, self.finite = self._running.pop(0)
            event.synchronize()
            self.num_ended += 1
