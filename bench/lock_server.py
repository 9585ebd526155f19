"""The peer: FastAPI and a lock around diffusers' DDPMPipeline, as its users serve it. A process of its own.

DDPMPipeline passes no labels, so it gets an unconditional twin of the checkpoint: the same weights without the class
embedding, which costs no FLOPs worth counting. The pipeline is diffusers' own, with the progress bar off.
"""

import argparse
import asyncio
import dataclasses
import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DDPMPipeline
from fastapi import FastAPI, Query, Response
from PIL import Image

from model.checkpoint import Labels, load_checkpoint, save_checkpoint


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.lock_server", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # One thread for loading and for all passes: a second OpenMP team, of another thread, would slow it by half.
    thread = ThreadPoolExecutor(1)
    pipeline = thread.submit(load_pipeline, args.checkpoint).result()
    thread.submit(pipeline, batch_size=4, num_inference_steps=3).result()  # warm before it says it is ready
    app = create_app(pipeline, thread)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


def load_pipeline(checkpoint_folder: Path) -> Any:
    """Load the twin as diffusers' own pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        save_twin(checkpoint_folder, Path(folder))
        pipeline: Any = DDPMPipeline.from_pretrained(folder)  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_twin(checkpoint_folder: Path, folder: Path) -> None:
    """Write the checkpoint without its class embedding."""
    checkpoint = load_checkpoint(checkpoint_folder)
    state = {key: value for key, value in checkpoint.net.state_dict().items() if not key.startswith("class_embedding.")}
    unet = dataclasses.replace(checkpoint.net.config, num_class_embeds=None)
    save_checkpoint(folder, state, unet, checkpoint.noise, Labels(), {})


def create_app(pipeline: Any, thread: ThreadPoolExecutor) -> FastAPI:
    """One request at a time goes through the pipeline, the others wait in order."""
    app = FastAPI()
    lock = asyncio.Lock()
    passes = {"row_steps": 0, "ticks": 0}

    def count(_net: torch.nn.Module, args: tuple[torch.Tensor, ...], _out: object) -> None:
        passes["row_steps"] += len(args[0])
        passes["ticks"] += 1

    pipeline.unet.register_forward_hook(count)

    def run(n: int, steps: int, seed: int) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(seed)
        images: list[Image.Image] = pipeline(batch_size=n, num_inference_steps=steps, generator=generator).images
        return images

    @app.post("/sample")
    async def sample(n: int = Query(ge=1, le=64), steps: int = Query(ge=1, le=1000), seed: int = 0) -> Response:
        async with lock:
            images = await asyncio.get_running_loop().run_in_executor(thread, run, n, steps, seed)
        return Response(await asyncio.to_thread(encode, images), media_type="image/png")

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/passes")
    async def get_passes() -> dict[str, float]:
        return {**passes, "cpu_s": time.process_time()}

    return app


def encode(images: list[Image.Image]) -> bytes:
    """One PNG, the images side by side."""
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (width * len(images), height))
    for k, image in enumerate(images):
        sheet.paste(image, (k * width, 0))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    main()
