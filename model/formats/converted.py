"""What every reader of a foreign format returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tminus.model.denoiser import NetConfig
from tminus.model.noise import NoiseConfig
from tminus.model.tminus_file import Labels


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint in our terms: what `save_checkpoint` takes."""

    format: str  # for people
    unet: NetConfig
    state: Mapping[str, Tensor]
    noise: NoiseConfig
    labels: Labels
    notes: tuple[str, ...] = ()
    """What the format is taken to be where its files do not say, for people to check."""


def numbered(classes: int | None, *, null_class: bool = False) -> Labels:
    """So many classes without names. null_class: the last of them means no class."""
    if classes is None:
        return Labels()
    names = tuple(map(str, range(classes - null_class)))
    return Labels(names, classes - 1 if null_class else None)
