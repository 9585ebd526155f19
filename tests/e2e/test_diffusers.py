"""The bundled checkpoint is diffusers' too: it loads there, and draws there what the server draws."""

import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from tests.e2e.conftest import BUNDLED, RunningServer
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise


def test_diffusers_draws_the_same_from_the_bundled_folder(
    bundled_server: RunningServer, own_server: Callable[..., RunningServer]
) -> None:
    pipeline: Any = DDPMPipeline.from_pretrained(BUNDLED)
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    unet: Any = UNet2DModel.from_pretrained(BUNDLED, subfolder="unet")
    scheduler: Any = DDIMScheduler.from_pretrained(BUNDLED, subfolder="scheduler")
    scheduler.set_timesteps(10)
    labels = torch.tensor([1, 7])
    x = image_noise(11, range(2), 0, (1, 32, 32), torch.device("cpu"))
    with torch.inference_mode():
        for t in scheduler.timesteps:
            eps = unet(x, t, class_labels=labels).sample
            x = scheduler.step(eps, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    theirs = to_uint8(x).numpy()[:, 0]

    def differences(running: RunningServer) -> Any:
        asked = {"n": 2, "steps": 10, "sampler": "ddim", "seed": 11, "class_label": ["trouser", "sneaker"]}
        with Image.open(io.BytesIO(running.post(json=asked).content)) as sheet:
            cells = np.asarray(sheet).reshape(1, 32, 2, 32).swapaxes(1, 2).reshape(2, 32, 32)
        return abs(cells.astype(int) - theirs.astype(int))

    assert differences(bundled_server).mean() < 1, "which runs as it does by default"
    float32 = bundled_server
    if httpx.get(f"{bundled_server.url}/model").json()["precision"] != "float32":
        float32 = own_server("--executor", "openvino", "--precision", "float32", checkpoint=BUNDLED)
    assert differences(float32).max() <= 1
