"""The steps of a job: how a client wants to see them, and the answers made of what was recorded on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.trajectory import LEAST_ETA
from tminus.service.api.request.fields import EVERY_BOUND, Bool, Float, Int, RequestSchema
from tminus.service.errors import InvalidField
from tminus.service.images.encoder import JSON, Encoder
from tminus.service.images.trajectory import TRAJECTORY, TRAJECTORY_VERSION
from tminus.service.model_info import ModelInfo
from tminus.service.preview import SHOWS, Pace, Show
from tminus.service.spec import SampleSpec
from tminus.service.work import JobResult, noisy_passes, timesteps_of
from tminus.service.worker.recording import Path, Recording, frame_count

MAX_FPS, DEFAULT_FPS = 60.0, 10.0
MAX_FRAME_BYTES = 16 * 2**20  # of pixels, all frames of one job
_BOUNDS = {
    "every": EVERY_BOUND,
    "fps": f"a number above 0, at most {MAX_FPS:g}",
    "show": f"one of {', '.join(SHOWS)}, or a list of both",
    "frame_format": "one of png, webp, jpeg",
    "layout": "one of sheet, images",
    "keep_open": "true or false",
}


class PreviewRequest(RequestSchema):
    """The frames of a running job: how often, of what, and how encoded."""

    every: Int | None = Field(None, ge=1, description="a frame after every so many steps")
    fps: Float | None = Field(None, description="or so many a second; 10 if neither is given")
    show: Show | list[Show] = Field(
        "x_t", description="x_t (the noisy image), x_0 (the network's guess), or a list of both"
    )
    frame_format: Literal["png", "webp", "jpeg"] = Field("png", description="png (default), webp or jpeg")
    layout: Literal["sheet", "images"] = Field(
        "sheet", description="sheet (default): one picture of all images; images: one each"
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> Self:
        """Check names, types and bounds. Raises UnknownField or InvalidField."""
        request = cls.from_parameters(parameters, _BOUNDS.__getitem__)
        fps, shows = request.fps, request.shows
        for field, ok in (
            ("fps", fps is None or 0 < fps <= MAX_FPS),
            ("show", 0 < len(shows) == len(set(shows))),
        ):
            if not ok:
                raise InvalidField.of(field, _BOUNDS[field], getattr(request, field))
        if request.every is not None and fps is not None:
            raise InvalidField.of("fps", "absent where every is given", fps)
        return request

    @property
    def shows(self) -> tuple[Show, ...]:
        """What is shown, in the order asked for."""
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)

    @property
    def pace(self) -> Pace:
        """How often."""
        return Pace(every=self.every) if self.every is not None else Pace(fps=self.fps or DEFAULT_FPS)


class StreamRequest(PreviewRequest):
    """The parameters of previews over a WebSocket, which may stay open for more jobs."""

    keep_open: Bool = Field(False, description="wait for another job when this one is done, instead of closing")


class AnimationRequest(RequestSchema):
    """What the frames of a job show, in an animation or as JSON; beside the parameters of SampleRequest."""

    every: Int = Field(
        ge=1, description="with Accept: image/webp or application/json, a frame after every so many steps of each image"
    )
    show: Show | list[Show] = Field(
        "x_t",
        description="what its frames show: x_t (the noisy image; default) or x_0 (the network's estimate); "
        "in JSON also a list of both",
    )
    until: Int | None = Field(
        None,
        ge=0,
        description="with Accept: application/json, the last step whose frame is wanted: no more are taken, "
        "and there are no images",
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any]) -> "AnimationRequest | None":
        """Take and check an animation's parameters; None where there are none. Raises InvalidField."""
        own = cls.own_of(parameters)
        if not own:
            return None
        if "every" not in own:
            name = next(iter(own))
            raise InvalidField.of(name, "absent where no animation is asked for by `every`", own[name])
        bounds = {
            "until": "an integer of at least 0",
            "every": EVERY_BOUND,
            "show": f"one of {', '.join(SHOWS)}, or with application/json a list of both",
        }
        asked = cls.from_parameters(own, bounds.__getitem__)
        if not 0 < len(asked.shows) == len(set(asked.shows)):
            raise InvalidField.of("show", bounds["show"], asked.show)
        return asked

    @property
    def shows(self) -> tuple[Show, ...]:
        """What is shown, in the order asked for."""
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)

    def held_bytes(self, spec: SampleSpec, model: ModelInfo, *, from_noise: bool = False) -> int:
        """What the frames before the result take, with x_T where `from_noise`. Raises InvalidField: they are too many.

        The bound, MAX_FRAME_BYTES, is for the frames after a step, that of the result too.
        """
        frame_bytes = len(self.shows) * spec.n * model.height_px * model.width_px * model.channels
        steps = spec.num_passes if self.until is None else min(spec.num_passes, self.until + 1)
        most, count = max(1, MAX_FRAME_BYTES // frame_bytes), frame_count(self.every, steps)
        if count > most:
            least = -(-steps // most)
            raise InvalidField.of("every", f"at least {least} for so many images and steps", self.every)
        return frame_bytes * (count - 1 + from_noise)


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
        """Name all that the bytes depend on beside the spec."""
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
