"""A validated request and its input pixels. Frozen values; imports neither torch nor asyncio."""

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
Pixels = npt.NDArray[np.uint8 | np.uint16 | np.float32]  # the same shape; dtype by bit depth
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A validated, complete request. Together with the weights and the fingerprint, a spec reproduces its images."""

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int  # index of the first image; image k of the request has noise (seed, index + k)
    class_labels: tuple[int | None, ...] | None  # one per image, None for no class; None for an unconditional model
    guidance: float  # 1 is off
    guidance_interval: tuple[int, int] | None  # timesteps, both ends included; None: all timesteps
    timestep_spacing: str
    clip: bool
    strength: float | None = None  # fraction of the steps that run, starting from the image; None: all steps, from x_T
    image_sha256: str | None = None  # hash of the image's pixels, which are in Inputs
    mask_sha256: str | None = None
    table: str | None = None  # hash of a sampler table of the checkpoint, for samplers that use tables
    guidance_rescale: float | None = None  # 0 to 1: rescaling of guided outputs to the std of conditional outputs
    to_seed: int | None = None  # the noise is interpolated between `seed` and `to_seed`
    mix: float | None = None  # position between the seeds: 0 is seed, 1 is to_seed
    bit_depth: int | None = None  # None: 8; see depth

    @property
    def start(self) -> int:
        """Return the first step of the rows: only the last `strength` of the steps run, at least one.

        diffusers truncates steps * strength (img2img's get_timesteps). Here the product is first rounded to nine
        decimals, because 0.29 * 100 is 28.999999999999996 in floating point and must give 29 steps.
        """
        if self.strength is None:
            return 0
        return self.steps - min(self.steps, max(1, int(round(self.steps * self.strength, 9))))

    @property
    def depth(self) -> int:
        """Return the bits of each value of the images: 8 or 16 for integers, 32 for floats."""
        return self.bit_depth or 8

    @property
    def num_passes(self) -> int:
        """Return the number of passes through the network for each row, without the second passes of guidance."""
        return SAMPLER_FACTS[self.sampler].num_passes(self.steps - self.start)

    @property
    def end(self) -> int:
        """Return the number of the last pass plus 1. Passes count from `start`, also if a step takes two passes."""
        return self.start + self.num_passes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Fields that default to None are omitted while they are None."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in NONE_BY_DEFAULT}

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "SampleSpec":
        """Build a spec from the output of `to_json`. Raises TypeError for missing or unknown fields."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in members.items()}
        return cls(**values)


NONE_BY_DEFAULT = frozenset(each.name for each in fields(SampleSpec) if each.default is None)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The pixels that an edit starts from. The spec holds their hashes."""

    image: Images  # [height, width, channels], for all rows of the job
    mask: npt.NDArray[np.bool_] | None = None  # [height, width]; pixels that are True are generated, others are kept
    latents: Floats | None = None  # [c, h, w], the image encoded for a latent model; not stored with durable jobs

    @property
    def image_sha256(self) -> str:
        """Hash the image's bytes, row by row."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    @property
    def mask_sha256(self) -> str | None:
        """Hash the mask's bytes, row by row: 1 for generated pixels, 0 for kept pixels."""
        return hashlib.sha256(self.mask.tobytes()).hexdigest() if self.mask is not None else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a job between two ticks: with the spec and the inputs, enough to resume the job."""

    steps: tuple[int, ...]  # the next pass of each row
    x: Floats  # [n, C, H, W]
    x0_previous: Floats
    registers: Floats  # [n, R, C, H, W], further state of the sampler; R is 0 to 4


TrajectoryType = Literal["float32", "float16"]  # dtype of x_t and x_0 in a trajectory file


@dataclass(frozen=True, slots=True)
class Point:
    """The rows between two passes of a trajectory. Each array is [n, C, H, W]."""

    x: Floats
    x_0: Floats  # prediction of the last pass, guided and clipped; 0 before the first pass
    v: Floats | None = None  # learned variance output of the last pass


def trial_spec(
    model: ModelInfo, n: int, steps: int, *, sampler: str | None = None, seed: int = 0, guidance: float = 1.0
) -> SampleSpec:
    """Return a spec that the model supports, for warm-up, measurement and tests."""
    sampler = sampler or model.default_sampler
    table = None
    if sampler in TABLE_SAMPLERS:  # Use a table's steps. If no table has this guidance, use a table's guidance too.
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
