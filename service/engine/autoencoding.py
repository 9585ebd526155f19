"""Latents to pixels and back, off the tick. Any thread may ask; one image at a time is made, each in a pass of its own.

A pass of one image has one fixed shape, so its bits do not depend on what else is decoded.
"""

import hashlib
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tminus.model.checkpoint import Checkpoint
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.latent.latents import colours_of, fit_colours
from tminus.model.pixels import to_model_range, to_uint8
from tminus.service.engine import openvino_executor
from tminus.service.engine.tf32 import multiplying
from tminus.service.engine.transfer import streams, to_device
from tminus.service.spec import Floats, Images

TIMED = 3  # images that are decoded to know how long one takes; the fastest counts
Pass = Callable[[Floats], Floats]


class Autoencoding:
    """Owns an autoencoder on its device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Of a latent model."""
        autoencoder = checkpoint.autoencoder
        assert autoencoder is not None
        self.factor = autoencoder.config.factor
        self._turn = threading.Lock()  # one image at a time: what runs beside the ticks is bounded
        self._device = device
        self._colours = fit_colours(autoencoder).to(device)
        decode, encode = _Decode(autoencoder), _Encode(autoencoder)
        if device.type == "cpu" and openvino_executor.available():
            # In one thread, so that the ticks keep the other cores.
            self._decode: Pass = openvino_executor.one_thread(decode, (1, *checkpoint.row_shape))
            self._encode: Pass = openvino_executor.one_thread(encode, (1, *checkpoint.image_shape))
        else:
            autoencoder.to(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # passes have a stream of their own, which must not begin before
            self._decode, self._encode = self._eager(decode), self._eager(encode)
        self._shape = checkpoint.row_shape

    def decode(self, latents: Floats) -> Images:
        """Pixels uint8 [n, H, W, C] of latents [n, c, h, w]."""
        return np.stack([self._decode_one(latents[k : k + 1]) for k in range(len(latents))])

    def encode(self, image: Images) -> Floats:
        """The latents [c, h, w] of an image [H, W, C]."""
        x = to_model_range(torch.tensor(image).permute(2, 0, 1)[None]).contiguous()
        with self._turn:
            latents: Floats = self._encode(x.numpy())[0]
            return latents

    def preview(self, latents: Tensor) -> Tensor:
        """Rough pictures of latents [n, c, h, w] on the device, in [-1, 1]: [n, C, H, W]."""
        return colours_of(latents, self._colours, self.factor)

    def seconds_per_image(self) -> tuple[float, float]:
        """How long one image takes to decode and to encode, with nothing beside it."""
        latents = np.zeros((1, *self._shape), np.float32)
        image = self.decode(latents)[0]
        return _fastest(lambda: self.decode(latents)), _fastest(lambda: self.encode(image))

    def bits(self) -> str:
        """A hash of what is encoded and decoded of fixed values: what the fingerprint says of this build's bits."""
        latents = torch.randn(1, *self._shape, generator=torch.Generator().manual_seed(0)).numpy()
        with self._turn:
            decoded = self._decode(latents)
            encoded = self._encode(decoded.clip(-1, 1))
        return hashlib.sha256(decoded.tobytes() + encoded.tobytes()).hexdigest()

    def _decode_one(self, latents: Floats) -> Images:
        with self._turn:
            x = self._decode(np.ascontiguousarray(latents))
        return to_uint8(torch.from_numpy(x))[0].permute(1, 2, 0).contiguous().numpy()

    def _eager(self, module: nn.Module) -> Pass:
        """Run a module with torch; on a GPU beside the ticks."""
        stream = streams(self._device).decoding if self._device.type == "cuda" else None

        def run(x: Floats) -> Floats:
            with torch.inference_mode(), torch.cuda.stream(stream):
                with multiplying(self._device, tf32=False):
                    out = module(to_device(x, self._device))
                pixels: Floats = out.cpu().numpy()
                return pixels

        return run


def _fastest(act: Callable[[], object]) -> float:
    act()
    seconds = []
    for _ in range(TIMED):
        began_s = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


class _Decode(nn.Module):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)


class _Encode(nn.Module):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)
