"""The peer: mosec with dynamic batching, each batch grouped by step count. A process of its own.

mosec reads --port, --address and --timeout from the same command line. Its worker is made in a process that gets
nothing but the environment.
"""

import os
from pathlib import Path
from typing import Any

import mosec
import torch

from bench.peers import arguments
from bench.peers.denoiser import Denoiser, Wanted
from bench.tally import Tally

MAX_BATCH_SIZE = 16
MAX_WAIT_MS = 5
FORWARD_S = 3600.0
CHECKPOINT, TALLY, DEVICE = "BENCH_CHECKPOINT", "BENCH_TALLY", "BENCH_DEVICE"
THREADS, OPENVINO = "BENCH_THREADS", "BENCH_OPENVINO"


class Sampler(mosec.Worker):
    """Requests in, PNGs out."""

    resp_mime_type = "image/png"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if threads := os.environ.get(THREADS):
            torch.set_num_threads(int(threads))
        checkpoint, tally = Path(os.environ[CHECKPOINT]), Tally(Path(os.environ[TALLY]))
        self._denoiser = Denoiser(checkpoint, tally, os.environ[DEVICE], os.environ.get(OPENVINO))

    def forward(self, data: list[dict[str, Any]]) -> list[bytes]:
        """Run a batch."""
        return self._denoiser.sample([Wanted.parse(body) for body in data])

    def serialize(self, data: bytes) -> bytes:
        """The PNG as it is."""
        return data


def main() -> None:
    """Serve until killed."""
    args = arguments(__doc__)
    environment = {CHECKPOINT: str(args.checkpoint), TALLY: str(args.tally), DEVICE: args.device}
    if args.threads is not None:
        environment[THREADS] = str(args.threads)
    if args.openvino is not None:
        environment[OPENVINO] = args.openvino
    server: Any = mosec.Server()  # type: ignore[no-untyped-call]
    server.append_worker(
        Sampler,
        num=args.workers,
        max_batch_size=MAX_BATCH_SIZE,
        max_wait_time=MAX_WAIT_MS,
        env=[environment] * args.workers,
        timeout=FORWARD_S,
        route="/sample",
    )
    server.run()


if __name__ == "__main__":
    main()
