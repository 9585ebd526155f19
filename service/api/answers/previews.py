"""How a client wants to see the steps of a job, while it runs or with its images, as pydantic models."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from tminus.service.api.request.fields import EVERY_BOUND, Bool, Float, Int, RequestSchema
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo
from tminus.service.preview import SHOWS, Pace, Show
from tminus.service.spec import SampleSpec
from tminus.service.worker.recording import frame_count

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
    """The same over a WebSocket, which may stay open for more jobs."""

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
