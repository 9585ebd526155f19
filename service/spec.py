"""One request, checked and complete, and the pixels that go with it. Pure frozen values; no torch, no asyncio."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS
from tminus.model.sampler_tables import nearest
from tminus.service.model_info import ModelInfo

Images = npt.NDArray[np.uint8]  # [n, height, width, channels]
Pixels = npt.NDArray[np.uint8 | np.uint16 | np.float32]  # the same, of a spec's bit depth
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One request, checked and complete: with it, the weights and the fingerprint, the images can be made again."""

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int  # of the first image; image k of the request has noise (seed, index + k)
    class_labels: tuple[int | None, ...] | None  # one an image, None for no class; None for an unconditional model
    guidance: float  # 1 is off
    guidance_interval: tuple[int, int] | None  # timesteps, both ends included; None: guided at all of them
    timestep_spacing: str
    clip: bool
    strength: float | None = None  # how much of the plan is run, from the image on; None: all of it, from x_T
    image_sha256: str | None = None  # of the image's pixels, which are in Inputs
    mask_sha256: str | None = None
    table: str | None = None  # the hash of the checkpoint's table, for a sampler that has tables
    guidance_rescale: float | None = None  # how far guidance is brought back to the spread of the conditional output
    to_seed: int | None = None  # its noise is between that of seed and of this one
    mix: float | None = None  # how far: 0 is seed, 1 is to_seed
    bit_depth: int | None = None  # None: 8; see depth

    @property
    def start(self) -> int:
        """The step that its rows begin with: the last `strength` of the steps are taken, at least one.

        diffusers cuts steps * strength off (img2img's get_timesteps). Here it is rounded at the ninth place first, so
        that 0.29 of 100 steps, 28.999999999999996 in floats, are 29.
        """
        if self.strength is None:
            return 0
        return self.steps - min(self.steps, max(1, int(round(self.steps * self.strength, 9))))

    @property
    def depth(self) -> int:
        """Return the bits of each value of the images: 8 or 16 of a whole number, or 32 of a float."""
        return self.bit_depth or 8

    @property
    def num_passes(self) -> int:
        """How many passes through the network each row takes; guidance doubles them, and is not counted here."""
        return SAMPLER_FACTS[self.sampler].num_passes(self.steps - self.start)

    @property
    def end(self) -> int:
        """The last pass's number plus 1. Passes are numbered from `start`, also where a step takes two."""
        return self.start + self.num_passes

    def to_json(self) -> dict[str, Any]:
        """Return the fields, without those that are None by default: a plain spec reads as it always did."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in NONE_BY_DEFAULT}

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "SampleSpec":
        """Make a spec of its fields as JSON has them. Raises TypeError where they are not its fields."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in members.items()}
        return cls(**values)


NONE_BY_DEFAULT = frozenset(each.name for each in fields(SampleSpec) if each.default is None)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The pixels that an edit starts from; its spec has their hashes."""

    image: Images  # [height, width, channels], for all rows of the job
    mask: npt.NDArray[np.bool_] | None = None  # [height, width]: true is made new, false is kept
    latents: Floats | None = None  # the image as a latent model sees it, [c, h, w]; not kept with a durable job

    @property
    def image_sha256(self) -> str:
        """Hash the image's bytes, row by row."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    @property
    def mask_sha256(self) -> str | None:
        """Hash the mask's bytes, row by row: 1 for new, 0 for known."""
        return hashlib.sha256(self.mask.tobytes()).hexdigest() if self.mask is not None else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job between two ticks: all that its rows need to go on, beside their spec and inputs."""

    steps: tuple[int, ...]  # the pass of the plan that each row is to take next
    x: Floats  # [n, C, H, W]
    x0_previous: Floats
    registers: Floats  # [n, R, C, H, W]: what the sampler keeps beside, R from 0 to 4


TrajectoryType = Literal["float32", "float16"]  # of x_t and x_0 in a file


@dataclass(frozen=True, slots=True)
class Point:
    """Rows between two passes, as a trajectory has them; each [n, C, H, W]."""

    x: Floats
    x_0: Floats  # what the network predicted in the last pass, guided and clipped; 0 before the first
    v: Floats | None = None  # of a learned variance, in the last pass


def trial_spec(
    model: ModelInfo, n: int, steps: int, *, sampler: str | None = None, seed: int = 0, guidance: float = 1.0
) -> SampleSpec:
    """A job that the model can do, for warming up, measuring and testing."""
    sampler = sampler or model.default_sampler
    table = None
    if sampler in TABLE_SAMPLERS:  # its steps, and where the guidance has no table, none
        own = [each for each in model.tables if each.sampler == sampler]
        table = nearest([each for each in own if (each.guidance == 1) == (guidance == 1)] or own, steps, guidance)
        steps, guidance = table.steps, table.guidance
    return SampleSpec(
        n=n,
        steps=steps,
        sampler=sampler,
        eta=0.0,
        seed=seed,
        index=0,
        class_labels=(0,) * n if model.conditional else None,
        guidance=guidance,
        guidance_interval=None,
        timestep_spacing=model.timestep_spacings[sampler],
        clip=model.clip,
        table=table.hash if table is not None else None,
    )
