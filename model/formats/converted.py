"""What every reader of a foreign format returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tminus.model.noise import NoiseConfig
from tminus.model.unet_config import UNetConfig


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint in our terms: what `save_checkpoint` takes."""

    format: str  # for people
    unet: UNetConfig
    state: Mapping[str, Tensor]
    noise: NoiseConfig
