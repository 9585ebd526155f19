"""The peer: LitServe with request-level batching, each batch grouped by step count. A process of its own.

Two remedies for short requests that wait behind long ones: `--way steps` is LitServe's continuous batching, where
requests join and leave between passes, and `--way queues` gives long requests a queue and workers of their own. There
is none for clients who leave: LitServe 0.2.19 tells a worker nothing of them.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import Response
from litserve.loops import ContinuousBatchingLoop
from litserve.loops.continuous_batching_loop import Output
from litserve.utils import LitAPIStatus
from starlette.types import ASGIApp, Receive, Scope, Send

from bench.peers import arguments
from bench.peers.denoiser import Course, Denoiser, Wanted
from bench.tally import Tally

MAX_BATCH_SIZE = 16
BATCH_TIMEOUT_S = 0.005
LONG_ROW_STEPS = 1000  # of a request that goes to the queue of long ones
IDLE_S = 0.001


def main() -> None:
    """Serve until killed."""
    args = arguments(__doc__)
    of = (args.checkpoint, args.tally, args.threads, args.openvino)
    apis: list[litserve.LitAPI]
    if args.way == "steps":
        apis = [StepByStep(*of, stream=True, loop=Loop())]
    else:
        paths = ("/sample", "/long") if args.way == "queues" else ("/sample",)
        apis = [Sampler(*of, path, max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S) for path in paths]
    server = litserve.LitServer(
        apis,
        accelerator=args.device,
        devices=1,
        timeout=False,
        workers_per_device=args.workers,
        middlewares=[ByLength] if args.way == "queues" else [],
    )
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

    def __init__(
        self,
        checkpoint: Path,
        tally: Path,
        threads: int | None,
        openvino: str | None,
        path: str = "/sample",
        **options: Any,
    ) -> None:
        super().__init__(api_path=path, **options)
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


class StepByStep(Sampler):
    """The same with continuous batching: a pass has the rows of all requests under way, each at its own step."""

    def setup(self, device: str) -> None:
        """Load the model."""
        super().setup(device)
        self._courses: dict[str, Course] = {}

    def add_request(self, uid: str, request: dict[str, Any]) -> None:
        """Begin a request."""
        self._courses[uid] = self._denoiser.begin(Wanted.parse(request))

    def has_capacity(self) -> bool:
        """Whether a pass has room for more."""
        return sum(len(course.rows) for course in self._courses.values()) < MAX_BATCH_SIZE

    def has_active_requests(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._courses)

    def step(self, _outputs: list[Output] | None) -> list[Output]:
        """Take a step of all, and answer those that have ended. LitServe wants an output of each step."""
        courses = dict(self._courses)
        self._denoiser.step(list(courses.values()))
        outputs = [Output(next(iter(courses)), b"", LitAPIStatus.OK)]
        for uid in [uid for uid, course in courses.items() if not course.timesteps]:
            outputs.append(Output(uid, self._denoiser.finish(self._courses.pop(uid)), LitAPIStatus.OK))
            outputs.append(Output(uid, b"", LitAPIStatus.FINISH_STREAMING))
        return outputs

    def encode_response(self, output: bytes) -> bytes:  # type: ignore[override]
        """The PNG as it is: LitServe streams it."""
        return output


class Loop(ContinuousBatchingLoop):  # type: ignore[misc]
    """LitServe's loop, which would take a core while nothing is under way."""

    async def run(self, lit_api: litserve.LitAPI, *args: Any) -> None:
        """Take the steps of all that is under way, until nothing is."""
        if not lit_api.has_active_requests():
            await asyncio.sleep(IDLE_S)
        await super().run(lit_api, *args)


class ByLength:
    """Middleware: long requests go to the path of their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, a hundred bytes in one message, and pass the request on."""
        if scope["type"] != "http" or scope["path"] != "/sample":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        wanted = Wanted.parse(json.loads(messages[0]["body"]))
        if wanted.n * wanted.steps > LONG_ROW_STEPS:
            scope = {**scope, "path": "/long", "raw_path": b"/long"}

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)


if __name__ == "__main__":
    main()
