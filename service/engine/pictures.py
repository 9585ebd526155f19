"""Between pictures and what the network sees: the pixels themselves, or the latents of an autoencoder.

The functions that `read`, `noised` and `encoder` return are called in other threads; they may take long.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.rng import image_noise
from tminus.service.engine.autoencoding import Autoencoding
from tminus.service.engine.transfer import copy_out, send, to_device
from tminus.service.errors import NotFinite
from tminus.service.spec import Floats, Images, Inputs


class Pictures(Protocol):
    """What the engine asks of either."""

    @property
    def bits(self) -> str | None:
        """A hash of what can change a pixel beside the network, see `fingerprint`."""

    def x_0(self, inputs: Inputs) -> Tensor:
        """The picture as the network sees it [C, H, W], on the device; pixels as uint8."""

    def read(self, x: Tensor, known: Sequence[Inputs | None]) -> Callable[[], Images]:
        """Images uint8 [n, H, W, C] of finished rows; known: for each what a mask keeps. Raises NotFinite."""

    def shown(self, x: Tensor) -> Tensor:
        """Rows that are not finished as pictures uint8 [n, H, W, C], on the device."""

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """x_t of images, both uint8 [n, H, W, C]."""

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """The inputs with what `x_0` needs."""

    def seconds_per_image(self) -> tuple[float, float]:
        """How long it takes to make an image of a finished row, and to encode one, beside the ticks."""


def pictures_of(checkpoint: Checkpoint, device: torch.device) -> Pictures:
    """Those of a checkpoint."""
    return PixelPictures(checkpoint, device) if checkpoint.autoencoder is None else LatentPictures(checkpoint, device)


class PixelPictures:
    """Of a pixel model: rows are pictures."""

    bits = None

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._shape, self._schedule, self._device = checkpoint.row_shape, checkpoint.noise.schedule(), device

    def x_0(self, inputs: Inputs) -> Tensor:
        """See Pictures."""
        return to_device(inputs.image, self._device).permute(2, 0, 1)

    def read(self, x: Tensor, known: Sequence[Inputs | None]) -> Callable[[], Images]:  # noqa: ARG002
        """See Pictures. Known pixels have come out as they went in."""
        read = copy_out(self._device, self.shown(x), x.isfinite().all())

        def images() -> Images:
            pixels, finite = read()
            if not finite:
                raise NotFinite
            return pixels.numpy()

        return images

    def shown(self, x: Tensor) -> Tensor:
        """See Pictures."""
        return _pixels(x)

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """See Pictures."""
        x_0 = send(torch.from_numpy(images).permute(0, 3, 1, 2), self._device)
        eps = image_noise(seed, range(len(images)), 0, self._shape, self._device)
        x_t = self._schedule.q_sample(to_model_range(x_0), torch.tensor([t]), eps)
        read = copy_out(self._device, self.shown(x_t))
        return lambda: read()[0].numpy()

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """See Pictures. Pixels need nothing."""
        return lambda: inputs

    def seconds_per_image(self) -> tuple[float, float]:
        """See Pictures: no time."""
        return 0.0, 0.0


class LatentPictures:
    """Of a latent model: an autoencoder, beside the ticks."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._shape, self._schedule, self._device = checkpoint.row_shape, checkpoint.noise.schedule(), device
        self._autoencoding = Autoencoding(checkpoint, device)
        self.bits = self._autoencoding.bits()

    def x_0(self, inputs: Inputs) -> Tensor:
        """See Pictures. What was encoded already is not again."""
        latents = inputs.latents if inputs.latents is not None else self._autoencoding.encode(inputs.image)
        return to_device(latents, self._device)

    def read(self, x: Tensor, known: Sequence[Inputs | None]) -> Callable[[], Images]:
        """See Pictures. Known pixels are put into what is decoded, so that they are kept bit for bit here too."""
        read = copy_out(self._device, x, x.isfinite().all())

        def images() -> Images:
            latents, finite = read()
            if not finite:
                raise NotFinite
            decoded = self._autoencoding.decode(latents.numpy())
            for image, kept in zip(decoded, known, strict=True):
                if kept is not None and kept.mask is not None:
                    image[~kept.mask] = kept.image[~kept.mask]
            return decoded

        return images

    def shown(self, x: Tensor) -> Tensor:
        """See Pictures. Colours are near the true ones, and each latent is a square of one colour."""
        return _pixels(self._autoencoding.preview(x))

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        """See Pictures. All of it is done in the other thread, on the host."""

        def make() -> Images:
            x_0 = torch.from_numpy(np.stack([self._autoencoding.encode(image) for image in images]))
            eps = image_noise(seed, range(len(images)), 0, self._shape, torch.device("cpu"))
            x_t: Floats = self._schedule.q_sample(x_0, torch.tensor([t]), eps).numpy()
            return self._autoencoding.decode(x_t)

        return make

    def seconds_per_image(self) -> tuple[float, float]:
        """See Pictures."""
        return self._autoencoding.seconds_per_image()

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        """See Pictures."""
        return lambda: replace(inputs, latents=self._autoencoding.encode(inputs.image))


def _pixels(x: Tensor) -> Tensor:
    return to_uint8(x).permute(0, 2, 3, 1).contiguous()
