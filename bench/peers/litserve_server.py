"""The peer: LitServe with request-level batching, each batch grouped by step count. A process of its own."""

from pathlib import Path

import litserve
import torch
from fastapi import Response

from bench.peers import arguments
from bench.peers.denoiser import Denoiser, Wanted
from bench.tally import Tally

MAX_BATCH_SIZE = 16
BATCH_TIMEOUT_S = 0.005


def main() -> None:
    """Serve until killed."""
    args = arguments(__doc__)
    api = Sampler(args.checkpoint, args.tally, args.threads, args.openvino)
    server = litserve.LitServer(api, accelerator=args.device, devices=1, timeout=False, workers_per_device=args.workers)
    # Quiet, as are the others: a line a request on stdout is no part of what is measured.
    server.run(
        host="127.0.0.1",
        port=args.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


class Sampler(litserve.LitAPI):  # type: ignore[misc]
    """Requests in, PNGs out. `setup` and `predict` run in one thread of the worker's process."""

    def __init__(self, checkpoint: Path, tally: Path, threads: int | None, openvino: str | None) -> None:
        super().__init__(api_path="/sample", max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
        self._checkpoint, self._tally, self._threads, self._openvino = checkpoint, tally, threads, openvino

    def setup(self, device: str) -> None:
        """Load the model."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self._denoiser = Denoiser(self._checkpoint, Tally(self._tally), device, self._openvino)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe would check the body by a type here
        """JSON to request."""
        return Wanted.parse(request)

    def batch(self, inputs: list[Wanted]) -> list[Wanted]:
        """Requests stay a list: they differ in size."""
        return inputs

    def predict(self, requests: list[Wanted]) -> list[bytes]:
        """Run a batch."""
        return self._denoiser.sample(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """An answer a request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Bytes to response."""
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    main()
