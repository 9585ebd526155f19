"""What a client asks to see of a job that runs, as a pydantic model. Pydantic stays here."""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api.schemas import Float, Int
from service.errors import InvalidField
from service.model_info import ModelInfo
from service.preview import SHOWS, Pace, Show
from service.spec import SampleSpec
from service.worker.recording import Recording, frame_count

MAX_FPS, DEFAULT_FPS = 60.0, 10.0
FRAME_FORMATS, LAYOUTS = ("png", "webp", "jpeg"), ("sheet", "images")
MAX_ANIMATION_BYTES = 16 * 2**20  # of pixels, all frames of one job
_PREVIEW_BOUNDS = {
    "every": "an integer of at least 1",
    "fps": f"a number above 0, at most {MAX_FPS:g}",
    "show": f"one of {', '.join(SHOWS)}, or a list of both",
    "frame_format": f"one of {', '.join(FRAME_FORMATS)}",
    "layout": f"one of {', '.join(LAYOUTS)}",
    "keep_open": "true or false",
}


class PreviewRequest(BaseModel):
    """How a job that runs is to be shown; beside the parameters of SampleRequest."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Int | None = Field(None, description="a frame after every so many steps")
    fps: Float | None = Field(None, description="or so many a second; 10 if neither is given")
    show: str | list[str] = Field("x_t", description="x_t (the latent), x_0 (the network's guess), or a list of both")
    frame_format: str = Field("png", description="png, webp or jpeg")
    layout: str = Field("sheet", description="sheet: one picture of all images; images: one each")
    keep_open: bool = Field(False, description="wait for another job when this one is done, instead of closing")

    @classmethod
    def split(cls, parameters: Mapping[str, Any]) -> tuple["PreviewRequest", dict[str, Any]]:
        """Take the preview's parameters out and check them; the rest is SampleRequest's. Raises InvalidField."""
        mine = {name: value for name, value in parameters.items() if name in cls.model_fields}
        rest = {name: value for name, value in parameters.items() if name not in mine}
        try:
            request = cls.model_validate(mine)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
            raise InvalidField.of(field, _PREVIEW_BOUNDS[field], mine[field]) from None
        request._check()
        return request, rest

    def _check(self) -> None:
        def require(ok: bool, field: str, value: object) -> None:
            if not ok:
                raise InvalidField.of(field, _PREVIEW_BOUNDS[field], value)

        require(self.every is None or self.every >= 1, "every", self.every)
        require(self.fps is None or 0 < self.fps <= MAX_FPS, "fps", self.fps)
        if self.every is not None and self.fps is not None:
            raise InvalidField.of("fps", "absent where every is given", self.fps)
        require(0 < len(self.shows) == len(set(self.shows)) and set(self.shows) <= {*SHOWS}, "show", self.show)
        require(self.frame_format in FRAME_FORMATS, "frame_format", self.frame_format)
        require(self.layout in LAYOUTS, "layout", self.layout)

    @property
    def shows(self) -> tuple[Show, ...]:
        """What is shown, in the order asked for."""
        return cast("tuple[Show, ...]", (self.show,) if isinstance(self.show, str) else tuple(self.show))

    @property
    def pace(self) -> Pace:
        """How often."""
        return Pace(every=self.every) if self.every is not None else Pace(fps=self.fps or DEFAULT_FPS)


class AnimationRequest(BaseModel):
    """What an animation of a job shows; beside the parameters of SampleRequest."""

    model_config = ConfigDict(extra="forbid")

    every: Int = Field(description="with Accept: image/webp, a frame after every so many steps of each image")
    show: str = Field("x_t", description="what its frames show: x_t (the latent) or x_0 (the network's guess)")

    @classmethod
    def split(cls, parameters: Mapping[str, Any]) -> tuple["AnimationRequest | None", dict[str, Any]]:
        """Take its parameters out and check them; None where none are given. Raises InvalidField."""
        mine = {name: value for name, value in parameters.items() if name in cls.model_fields}
        rest = {name: value for name, value in parameters.items() if name not in mine}
        if not mine:
            return None, rest
        if "every" not in mine:
            raise InvalidField.of("show", "absent where no animation is asked for by `every`", mine["show"])
        bounds = {"every": "an integer of at least 1", "show": f"one of {', '.join(SHOWS)}"}
        try:
            request = cls.model_validate(mine)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
            raise InvalidField.of(field, bounds[field], mine[field]) from None
        for field, fine in (("every", request.every >= 1), ("show", request.show in SHOWS)):
            if not fine:
                raise InvalidField.of(field, bounds[field], mine[field])
        return request, rest

    def size_bytes(self, spec: SampleSpec, model: ModelInfo) -> int:
        """What its frames take, as pixels. Raises InvalidField where that is too much."""
        frame_bytes = spec.n * model.height_px * model.width_px * model.channels
        most = max(1, MAX_ANIMATION_BYTES // frame_bytes)
        if frame_count(self.every, spec.num_steps) > most:
            least = -(-spec.num_steps // most)
            raise InvalidField.of("every", f"at least {least} for so many images and steps", self.every)
        return frame_bytes * (frame_count(self.every, spec.num_steps) - 1)  # the result is held anyhow

    def recording(self, spec: SampleSpec) -> Recording:
        """An empty one."""
        return Recording(self.every, cast("Show", self.show), spec.n, spec.num_steps)
