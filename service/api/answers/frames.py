"""The way from noise to the images as JSON: x_t and x_0 of the noise and after every so many steps, with timesteps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tminus.service.api.answers.previews import AnimationRequest
from tminus.service.images.encoder import JSON, Encoder
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec
from tminus.service.work import JobResult, timesteps_of
from tminus.service.worker.recording import Recording


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
