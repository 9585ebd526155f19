"""Converts between images and the network's input: pixels, or the latents of an autoencoder.

`read`, `noised` and `encoder` return functions that can be slow. Call these functions in other threads.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tminus.model.checkpoint import Checkpoint
from tminus.model.files import first_line
from tminus.model.latent.autoencoder import Autoencoder, colours_of, fit_colours
from tminus.model.pixels import shown_channels, to_model_range, to_uint8, to_uint16
from tminus.model.rng import image_noise
from tminus.service.engine import openvino_executor
from tminus.service.engine.accuracy import Verdict
from tminus.service.engine.devices import copy_out, multiplying, send, streams, to_device
from tminus.service.errors import NotFinite
from tminus.service.spec import Floats, Images, Inputs, Pixels

log = logging.getLogger(__name__)

TIMED = 3  # number of timed calls; the fastest counts
LONG_S = 0.5  # if the first decoding and encoding take longer together, they are not timed again
Pass = Callable[[Floats], Floats]


class PixelPictures:
    """Images of a pixel model, whose rows are the images themselves."""

    bits: str | None = None  # hash of an autoencoder's outputs, see `fingerprint`

    def __init__(self, checkpoint: Checkpoint, device: torch.device, cache: Path | None) -> None:  # noqa: ARG002
        """cache: the folder for converted graphs."""
        self._shape, self._schedule, self._device = checkpoint.row_shape, checkpoint.noise.schedule(), device
        self._shown_channels = shown_channels(checkpoint.image_shape[0], alpha=checkpoint.alpha)

    def x_0(self, inputs: Inputs) -> Tensor:
        """Return the image as the network's input on the device: for a pixel model, its pixels, uint8 [C, H, W]."""
        return to_device(inputs.image, self._device).permute(2, 0, 1)

    def read(self, x: Tensor, known: Sequence[Inputs | None], bit_depth: int) -> Callable[[], Pixels]:  # noqa: ARG002
        """Read finished rows as images [n, H, W, C]. The returned function raises NotFinite if a row is not finite.

        bit_depth: 8 or 16 for integers, 32 for float32. known: for each row, its image and mask, or None if it has no
        mask. A pixel model ignores `known`, because the known pixels of its rows are already unchanged.
        """
        read = copy_out(self._device, _channels_last(to_uint8(x) if bit_depth == 8 else x), x.isfinite().all())

        def images() -> Pixels:
            pixels, finite = read()
            if not finite:
                raise NotFinite
            return to_uint16(pixels.numpy()) if bit_depth == 16 else pixels.numpy()

        return images

    def shown(self, x: Tensor) -> Tensor:
        """Convert unfinished rows to uint8 [n, H, W, C] on the device. Drop channels that pictures do not show."""
        return _channels_last(to_uint8(x[:, : self._shown_channels]))

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """Return a function that adds noise to images, to make x_t from x_0. Images are uint8 [n, H, W, C]."""
        x_0 = send(torch.from_numpy(images).permute(0, 3, 1, 2), self._device)
        eps = image_noise(seed, range(len(images)), 0, self._shape, self._device)
        x_t = self._schedule.q_sample(to_model_range(x_0), torch.tensor([t]), eps)
        read = copy_out(self._device, self.shown(x_t))
        return lambda: read()[0].numpy()

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """Return a function that prepares inputs for `x_0`. A pixel model needs no preparation."""
        return lambda: inputs

    def seconds_per_image(self) -> tuple[float, float]:
        """Return how many seconds it takes to decode an image and to encode one; 0 for a pixel model."""
        return 0.0, 0.0


class LatentPictures(PixelPictures):
    """Images of a latent model. An autoencoder encodes and decodes them outside of ticks.

    Thread-safe: one image is processed at a time. Every pass takes a single image and has the same shape, so an image's
    bits do not depend on other images.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, cache: Path | None) -> None:
        super().__init__(checkpoint, device, cache)
        autoencoder = checkpoint.autoencoder
        assert autoencoder is not None
        self._factor = autoencoder.config.factor
        self._turn = threading.Lock()  # one image at a time, to limit the load beside the ticks
        self._colours = fit_colours(autoencoder).to(device)
        autoencoder.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # passes run in another stream, which needs the weights
        latents = torch.randn(1, *self._shape, generator=torch.Generator().manual_seed(0)).numpy()
        decode, encode = _Part(autoencoder, autoencoder.decode), _Part(autoencoder, autoencoder.encode)
        self._decode_pass, decoded, decoded_s = self._pass(checkpoint, "decoder", decode, latents, cache)
        self._encode_pass, encoded, encoded_s = self._pass(checkpoint, "encoder", encode, decoded.clip(-1, 1), cache)
        self._first_s = decoded_s, encoded_s
        self.bits = hashlib.sha256(decoded.tobytes() + encoded.tobytes()).hexdigest()

    def x_0(self, inputs: Inputs) -> Tensor:
        """Return the image's latents [c, h, w] on the device. Encode the image if its latents are not given."""
        latents = inputs.latents if inputs.latents is not None else self._encode(inputs.image)
        return to_device(latents, self._device)

    def read(self, x: Tensor, known: Sequence[Inputs | None], bit_depth: int) -> Callable[[], Pixels]:
        """Decode finished rows. Known pixels are copied into the images, so they stay the same bit for bit."""
        read = copy_out(self._device, x, x.isfinite().all())

        def images() -> Pixels:
            latents, finite = read()
            if not finite:
                raise NotFinite
            decoded = self._decode(latents.numpy())
            for image, kept in zip(decoded, known, strict=True):
                if kept is not None and kept.mask is not None:
                    at = torch.from_numpy(~kept.mask)
                    image[:, at] = to_model_range(torch.tensor(kept.image).permute(2, 0, 1))[:, at]
            pixels = _channels_last(to_uint8(decoded) if bit_depth == 8 else decoded).numpy()
            return to_uint16(pixels) if bit_depth == 16 else pixels

        return images

    def shown(self, x: Tensor) -> Tensor:
        """Make rough images without the decoder. Each latent becomes a square of one approximate colour."""
        return super().shown(colours_of(x, self._colours, self._factor))

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """Return a function that encodes images, adds noise to make x_t, and decodes the result."""

        def make() -> Images:
            x_0 = torch.from_numpy(np.stack([self._encode(image) for image in images]))
            eps = image_noise(seed, range(len(images)), 0, self._shape, torch.device("cpu"))
            x_t: Floats = self._schedule.q_sample(x_0, torch.tensor([t]), eps).numpy()
            return super(LatentPictures, self).shown(self._decode(x_t)).numpy()

        return make

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """Return a function that adds latents to the inputs."""
        return lambda: replace(inputs, latents=self._encode(inputs.image))

    def seconds_per_image(self) -> tuple[float, float]:
        """Return how many seconds it takes to decode an image and to encode one, on an idle machine."""
        if sum(self._first_s) > LONG_S:
            return self._first_s
        latents = np.zeros((1, *self._shape), np.float32)
        image = _channels_last(to_uint8(self._decode(latents)))[0].numpy()
        return _fastest(lambda: self._decode(latents)), _fastest(lambda: self._encode(image))

    def _decode(self, latents: Floats) -> Tensor:
        """Decode latents [n, c, h, w] to float32 [n, C, H, W], roughly in [-1, 1]."""
        images = []
        for k in range(len(latents)):
            with self._turn:
                images.append(torch.tensor(self._decode_pass(np.ascontiguousarray(latents[k : k + 1]))))
        return torch.cat(images)

    def _encode(self, image: Images) -> Floats:
        """Encode an image [H, W, C] to latents [c, h, w]."""
        x = to_model_range(torch.tensor(image).permute(2, 0, 1)[None]).contiguous()
        with self._turn:
            latents: Floats = self._encode_pass(x.numpy())[0]
            return latents

    def _pass(
        self, checkpoint: Checkpoint, part: str, module: nn.Module, x: Floats, cache: Path | None
    ) -> tuple[Pass, Floats, float]:
        """Build the fastest accurate pass for the encoder or decoder. Return it, its output for x, and its duration."""
        eager = self._eager(module)
        if self._device.type == "cpu" and openvino_executor.available():
            verdict = Verdict(checkpoint, self._device, "openvino", "float32", cache, part)
            file = openvino_executor.kept_graph(cache, checkpoint, part)
            try:
                with verdict.attempt():
                    run = openvino_executor.one_thread(module, x.shape, file)  # leaves other cores to the ticks
                    out, seconds = _timed(run, x)
                    verdict.check(
                        hashlib.sha256(out.tobytes()).hexdigest(),
                        lambda: torch.from_numpy(out),
                        lambda: torch.from_numpy(eager(x)),
                    )
                return run, out, seconds
            except Exception as error:
                log.warning("%s is not used: %s", verdict.name, first_line(error))
        return eager, *_timed(eager, x)

    def _eager(self, module: nn.Module) -> Pass:
        """Return a function that runs a module with torch. On a GPU, it uses a separate stream beside the ticks."""
        stream = streams(self._device).decoding if self._device.type == "cuda" else None

        def run(x: Floats) -> Floats:
            with torch.inference_mode(), torch.cuda.stream(stream):
                with multiplying(self._device, tf32=False):
                    out = module(to_device(x, self._device))
                pixels: Floats = out.cpu().numpy()
                return pixels

        return run


def _channels_last(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).contiguous()


def _timed(run: Pass, x: Floats) -> tuple[Floats, float]:
    began_s = time.perf_counter()
    return run(x), time.perf_counter() - began_s


def _fastest(act: Callable[[], object]) -> float:
    act()
    seconds = []
    for _ in range(TIMED):
        began_s = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


class _Part(nn.Module):
    """Wraps the encoder or the decoder as a module, because OpenVINO converts only modules."""

    def __init__(self, autoencoder: Autoencoder, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.autoencoder, self._run = autoencoder, run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)
