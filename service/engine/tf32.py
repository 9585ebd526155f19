"""Whether CUDA multiplies float32 in TF32. That is a flag of the process, where several models may run side by side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_turn = threading.RLock()


@contextmanager
def multiplying(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Launch float32 matmuls and convolutions in TF32 or not, whose defaults in torch differ; nothing on a CPU.

    Other threads that launch in here wait; what is launched runs on when they go on. The flags are then as they were.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with _turn:
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before
