"""What a client asks to see of a job that runs, as a pydantic model. Pydantic stays here."""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidField
from service.preview import SHOWS, Pace, Show
from service.schemas import Float, Int

MAX_FPS, DEFAULT_FPS = 60.0, 10.0
FRAME_FORMATS, LAYOUTS = ("png", "webp", "jpeg"), ("sheet", "images")
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
