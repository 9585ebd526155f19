"""Answers made of what a job recorded on its way: its frames as JSON, or the trajectory of its latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.trajectory import LEAST_ETA
from tminus.service.api.answers.previews import AnimationRequest
from tminus.service.errors import InvalidField
from tminus.service.images.encoder import JSON, Encoder
from tminus.service.images.trajectory import TRAJECTORY, TRAJECTORY_VERSION
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec
from tminus.service.work import JobResult, noisy_passes, timesteps_of
from tminus.service.worker.recording import Path, Recording

MAX_TRAJECTORY_BYTES = 32 * 2**20  # of the file


@dataclass(frozen=True, slots=True)
class Frames:
    """An answer with the frames as PNGs, and the finished images."""

    spec: SampleSpec
    asked: AnimationRequest
    timesteps: Sequence[float]
    held_bytes: int  # of frames, until the job is done
    recording: Recording
    held_for: ClassVar[str] = "every"
    media_type: ClassVar[str] = JSON

    @classmethod
    def of(cls, spec: SampleSpec, asked: AnimationRequest, model: ModelInfo) -> "Frames":
        """Prepare to record a job's frames. Raises InvalidField where their pixels are too many."""
        held_bytes = asked.held_bytes(spec, model, from_noise=True)
        passes = spec.num_passes
        recording = Recording(asked.every, asked.shows, spec.n, passes, from_noise=True, until=asked.until)
        return cls(spec, asked, timesteps_of(spec, model), held_bytes, recording)

    @property
    def kind(self) -> str:
        """All but the spec that its bytes depend on."""
        asked = self.asked
        return f"{JSON}; from noise; every={asked.every}; until={asked.until}; show={','.join(asked.shows)}"

    async def encode(self, encoder: Encoder, result: JobResult, made_by: ModelInfo) -> bytes:
        """Make the body. Raises NotFinite."""
        whole = self.asked.until is None
        return await encoder.encode_path(
            self.spec, self.recording.frames, self.timesteps, result if whole else None, made_by
        )


@dataclass(frozen=True, slots=True)
class Steps:
    """An answer with the latents of every step, and what the noisy ones drew from: a trajectory."""

    spec: SampleSpec
    held_bytes: int
    recording: Path
    held_for: ClassVar[str] = "n"
    media_type: ClassVar[str] = TRAJECTORY
    kind: ClassVar[str] = f"{TRAJECTORY}; {TRAJECTORY_VERSION}"

    @classmethod
    def of(cls, spec: SampleSpec, model: ModelInfo) -> "Steps":
        """Prepare to record a job's steps. Raises InvalidField where they add too little noise, or are too many."""
        if SAMPLER_FACTS[spec.sampler].noise == "eta" and spec.eta < LEAST_ETA:
            bound = f"at least {LEAST_ETA} with Accept: {TRAJECTORY}: of less noise float32 leaves no exact log p"
            raise InvalidField.of("eta", bound, spec.eta)
        noisy = noisy_passes(spec, model)
        if not noisy:
            raise _without_noise(spec, model)
        if spec.mask_sha256 is not None:
            bound = f"absent with Accept: {TRAJECTORY}: what is kept is drawn from the image, not by the model"
            raise InvalidField.of("mask", bound, spec.mask_sha256)
        pixels = model.height_px * model.width_px * model.channels
        latents = pixels if model.latent is None else model.latent.channels * model.latent.height * model.latent.width
        by_value = model.variance_type == "learned_range" and spec.sampler == "ddpm"  # s, too
        image_bytes = 4 * latents * (2 * spec.num_passes + 1 + noisy * (2 if by_value else 1)) + pixels
        most = MAX_TRAJECTORY_BYTES // image_bytes
        if most == 0:
            raise InvalidField.of("steps", f"fewer with Accept: {TRAJECTORY}, for images of this size", spec.steps)
        if spec.n > most:
            raise InvalidField.of("n", f"1..{most} with Accept: {TRAJECTORY}, for so many steps", spec.n)
        # While it is packed there are the arrays, their bytes, and the file.
        return cls(spec, 3 * spec.n * image_bytes, Path(spec))

    async def encode(self, encoder: Encoder, result: JobResult, made_by: ModelInfo) -> bytes:
        """Make the body. Raises NotFinite."""
        return await encoder.encode_trajectory(self.recording.trajectory, self.spec, result, made_by)


def _without_noise(spec: SampleSpec, model: ModelInfo) -> InvalidField:
    """Say what to change where no step adds noise, so that none has a log p."""
    noise = SAMPLER_FACTS[spec.sampler].noise
    if noise != "none" and spec.strength is not None:
        bound = f"enough for two steps with Accept: {TRAJECTORY}: the last adds no noise"
        return InvalidField.of("strength", bound, spec.strength)
    if noise != "none":
        bound = f"at least 2 with Accept: {TRAJECTORY}: the last adds no noise"
        return InvalidField.of("steps", bound, spec.steps)
    said = {"eta": f" (eta at least {LEAST_ETA})", "always": ""}
    noises = {name: SAMPLER_FACTS[name].noise for name in model.samplers}
    noisy = [f"{name}{said[noise]}" for name, noise in noises.items() if noise != "none"]
    bound = f"one of {', '.join(noisy)} with Accept: {TRAJECTORY}: the steps of others add no noise, and have no log p"
    return InvalidField.of("sampler", bound, spec.sampler)
