"""Whether CUDA multiplies float32 in TF32. That is a flag of the process, where several models may run side by side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class _Flags:
    """Owns the two flags while somebody launches."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    launching: int = 0  # threads that want them as they are
    before: tuple[bool, bool] = (False, False)  # what they were when nobody launched

    def take(self, tf32: bool) -> None:
        """Set the flags, or wait while others launch who want them otherwise."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        with self.changed:
            self.changed.wait_for(lambda: not self.launching or matmul.allow_tf32 == tf32)
            if not self.launching:
                self.before = matmul.allow_tf32, cudnn.allow_tf32
                matmul.allow_tf32 = cudnn.allow_tf32 = tf32
            self.launching += 1

    def leave(self) -> None:
        """Set the flags back, unless others still launch."""
        with self.changed:
            self.launching -= 1
            if not self.launching:
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
                self.changed.notify_all()


_flags = _Flags()


@contextmanager
def multiplying(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Launch float32 matmuls and convolutions in TF32 or not, whose defaults in torch differ; nothing on a CPU.

    Any number of threads may launch in here if they want the same; others wait, since torch.compile, which may take a
    minute, is called in here too. What is launched runs on when they go on. Afterwards the flags are as they were. Not
    to be entered again with the other value.
    """
    if device.type != "cuda":
        yield
        return
    _flags.take(tf32)
    try:
        yield
    finally:
        _flags.leave()
