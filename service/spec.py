"""A validated request and its input pixels. Frozen dataclasses; imports neither torch nor asyncio."""

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
Pixels = npt.NDArray[np.uint8 | np.uint16 | np.float32]  # the same shape; the bit depth decides the dtype
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A validated, complete request.

    The spec, the weights and the fingerprint determine the images, if the model is exact.
    """

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int  # index of the first image; the noise of image k comes from (seed, index + k)
    class_labels: tuple[int | None, ...] | None  # one per image (None for no class); None for an unconditional model
    guidance: float  # 1 turns guidance off
    guidance_interval: tuple[int, int] | None  # lowest and highest guided timestep, inclusive; None for all timesteps
    timestep_spacing: str
    clip: bool
    strength: float | None = None  # fraction of the steps that run, from an input image; None: all steps, from noise
    image_sha256: str | None = None  # hash of the input image's pixels; Inputs has the pixels
    mask_sha256: str | None = None
    table: str | None = None  # hash of one of the checkpoint's sampler tables, for samplers that use tables
    guidance_rescale: float | None = None  # 0 to 1: rescales guided outputs towards the std of conditional outputs
    to_seed: int | None = None  # if set, the noise is interpolated between `seed` and `to_seed`
    mix: float | None = None  # position between the two seeds: 0 is `seed`, 1 is `to_seed`
    bit_depth: int | None = None  # None means 8; see `depth`

    @property
    def start(self) -> int:
        """Return the first step that runs.

        With `strength`, only that fraction of the steps runs, at least one step. diffusers truncates steps * strength
        (get_timesteps in img2img). This code first rounds the product to nine decimals: 0.29 * 100 is
        28.999999999999996 in floating point, and must give 29 steps.
        """
        if self.strength is None:
            return 0
        return self.steps - min(self.steps, max(1, int(round(self.steps * self.strength, 9))))

    @property
    def depth(self) -> int:
        """Return the bits per value of the images: 8 or 16 for integers, 32 for floats."""
        return self.bit_depth or 8

    @property
    def num_passes(self) -> int:
        """Return the number of network passes per row. The second pass of a guided row does not count."""
        return SAMPLER_FACTS[self.sampler].num_passes(self.steps - self.start)

    @property
    def end(self) -> int:
        """Return the number of the last pass, plus 1. Passes are numbered from `start`, even when a step takes two."""
        return self.start + self.num_passes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Optional fields are omitted while they are None."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in NONE_BY_DEFAULT}

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "SampleSpec":
        """Create a spec from the output of `to_json`. Raises TypeError for missing or unknown fields."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in members.items()}
        return cls(**values)


NONE_BY_DEFAULT = frozenset(each.name for each in fields(SampleSpec) if each.default is None)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The pixels that an edit starts from. The spec has their hashes."""

    image: Images  # [height, width, channels]; all rows of the job start from it
    mask: npt.NDArray[np.bool_] | None = None  # [height, width]; True for generated pixels, False for kept pixels
    latents: Floats | None = None  # [c, h, w]; the image, encoded for a latent model; not stored with durable jobs

    @property
    def image_sha256(self) -> str:
        """Return the hash of the image's pixels in row-major order."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    @property
    def mask_sha256(self) -> str | None:
        """Return the hash of the mask in row-major order, one byte per pixel: 1 if generated, 0 if kept."""
        return hashlib.sha256(self.mask.tobytes()).hexdigest() if self.mask is not None else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a job between two ticks. A job resumes from its spec, inputs and snapshot."""

    steps: tuple[int, ...]  # number of each row's next pass
    x: Floats  # [n, C, H, W]
    x0_previous: Floats
    registers: Floats  # [n, R, C, H, W]; further state of the sampler; R is 0 to 4


TrajectoryType = Literal["float32", "float16"]  # dtype of x_t and x_0 in a trajectory file


@dataclass(frozen=True, slots=True)
class Point:
    """The state of a trajectory's rows between two passes. Each array is [n, C, H, W]."""

    x: Floats
    x_0: Floats  # estimate of the image in the previous pass, guided and clipped; 0 before the first pass
    v: Floats | None = None  # the network's variance output in the previous pass


def trial_spec(
    model: ModelInfo, n: int, steps: int, *, sampler: str | None = None, seed: int = 0, guidance: float = 1.0
) -> SampleSpec:
    """Return a spec that the model supports, for warm-up, measurement and tests."""
    sampler = sampler or model.default_sampler
    table = None
    if sampler in TABLE_SAMPLERS:  # the nearest table sets the steps and the guidance
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
