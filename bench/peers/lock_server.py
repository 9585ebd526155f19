"""The peer: FastAPI and a lock around diffusers' DDPMPipeline, as its users serve it. A process of its own.

DDPMPipeline passes no labels, so it gets an unconditional twin of the checkpoint: the same weights without the class
embedding, which costs no FLOPs worth counting. The pipeline is diffusers' own, with the progress bar off.
"""

import asyncio
import dataclasses
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DDPMPipeline
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import BaseModel, Field

from bench.peers import arguments, encode
from bench.peers.denoiser import faster_layout
from bench.tally import Tally
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint


class Body(BaseModel):
    """One request. A sampler other than DDPM's or a class is more than DDPMPipeline can do."""

    n: int = Field(1, ge=1, le=64)
    steps: int = Field(1000, ge=1, le=1000)
    seed: int = 0
    sampler: str = Field("ddpm", pattern="^ddpm$")


def main() -> None:
    """Serve until killed."""
    args = arguments(__doc__)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # One thread for loading and for all passes: a second OpenMP team, of another thread, would slow it.
    thread = ThreadPoolExecutor(1)
    pipeline = thread.submit(load_pipeline, args.checkpoint, args.device).result()
    thread.submit(pipeline, batch_size=4, num_inference_steps=3).result()  # warm before it says it is ready
    app = create_app(pipeline, thread, Tally(args.tally))
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


def load_pipeline(checkpoint_folder: Path, device: str = "cpu") -> Any:
    """Load the twin as diffusers' own pipeline, in the faster of the two memory layouts."""
    with tempfile.TemporaryDirectory() as folder:
        save_twin(checkpoint_folder, Path(folder))
        pipeline: Any = DDPMPipeline.from_pretrained(folder)  # type: ignore[no-untyped-call]
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    config, net = pipeline.unet.config, pipeline.unet
    shape = (config.in_channels, config.sample_size, config.sample_size)
    faster_layout(net, lambda x, t, _labels: net(x, t, return_dict=False)[0], shape)
    return pipeline


def save_twin(checkpoint_folder: Path, folder: Path) -> None:
    """Write the checkpoint without its class embedding."""
    checkpoint = load_checkpoint(checkpoint_folder)
    state = {key: value for key, value in checkpoint.net.state_dict().items() if not key.startswith("class_embedding.")}
    unet = dataclasses.replace(checkpoint.net.config, num_class_embeds=None)
    save_checkpoint(folder, state, unet, checkpoint.noise, Labels(), {})


def create_app(pipeline: Any, thread: ThreadPoolExecutor, tally: Tally) -> FastAPI:
    """One request at a time goes through the pipeline, the others wait in order."""
    app = FastAPI()
    lock = asyncio.Lock()

    def count(_net: torch.nn.Module, args: tuple[torch.Tensor, ...], _out: object) -> None:
        tally.add(len(args[0]))

    pipeline.unet.register_forward_hook(count)

    def run(body: Body) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(body.seed)
        images: list[Image.Image] = pipeline(
            batch_size=body.n, num_inference_steps=body.steps, generator=generator
        ).images
        return images

    @app.post("/sample")
    async def sample(body: Body) -> Response:
        async with lock:
            images = await asyncio.get_running_loop().run_in_executor(thread, run, body)
        return Response(await asyncio.to_thread(encode, images), media_type="image/png")

    return app


if __name__ == "__main__":
    main()
