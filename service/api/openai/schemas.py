"""The parameters of requests to /v1/images, as pydantic models, and their conversion to parameters of POST /sample."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tminus.model.catalogue import TABLE_SAMPLERS, Recommended
from tminus.service.api.request.classes import class_label_of, class_of_prompt
from tminus.service.api.request.schemas import (
    BOUND,
    DIFFUSERS_NAMES,
    NOT_ADAPTIVE,
    AsInteger,
    Bool,
    Bound,
    Bounds,
    Edit,
    Int,
    JobCall,
    Percent,
    RequestSchema,
    Sampling,
    in_words,
)
from tminus.service.api.request.specs import choose_table, settings_of_rung
from tminus.service.errors import InvalidField, ValidationErrors
from tminus.service.model_info import Limits, ModelInfo

MAX_N = 10  # OpenAI's limit; --max-n may be lower
MAX_PARTIAL_IMAGES = 3
Quality = Literal["low", "medium", "high"]
MEANINGS: Mapping[str, Quality] = {"auto": "medium", "standard": "medium", "hd": "high"}
ONLY_MODEL = "default"  # vLLM-Omni's benchmark sends this name; accepted if one model is served


class Members(RequestSchema):
    """The members of an image request that OpenAI defines."""

    prompt: Annotated[str, Field(json_schema_extra={BOUND: "given, as text: the name of a class, or empty"})]
    """A class by name or number, in any case; empty for no class. Nothing else is understood."""
    model: Annotated[
        str | None,
        in_words(
            "the server's default model",
            f"the name of a model that GET /v1/models lists, or {ONLY_MODEL} if it lists one",
        ),
    ] = None
    """The name of a model that is served. `default` is the model that is served alone."""
    size: Annotated[str, in_words("`auto`")] = "auto"
    """`auto`, or the model's own size, such as `32x32`."""
    quality: Annotated[Literal["auto", "low", "medium", "high", "standard", "hd"], in_words("`auto`")] = "auto"
    """Which setting. `medium` and `standard`: what `POST /sample` takes by default. `high` and `hd`: the model's
    first in the `ladder` of `GET /model`. `low`: its last there. `auto`: with `deadline_s`, `quality=adaptive` of
    `POST /sample`, otherwise `medium`. It has no effect where the request names a setting."""
    response_format: Annotated[Literal["b64_json", "url"], in_words("`b64_json`")] = "b64_json"
    """`b64_json`: the images as base64. `url`: the addresses of the images of a durable job."""
    output_format: Annotated[Literal["png", "jpeg", "webp"], in_words("`png`")] = "png"
    """The format of the images."""
    output_compression: Annotated[Percent | None, in_words("100")] = None
    """The quality of `jpeg` and `webp`. PNGs take only 100."""
    background: Annotated[Literal["auto", "opaque", "transparent"], in_words("`auto`")] = "auto"
    """For a model with alpha: `transparent` keeps it, `opaque` lays the images over white, and `auto` keeps it where
    `output_format` can. Images of other models are opaque."""
    stream: Annotated[Bool, in_words("false")] = False
    """Answer by server-sent events."""
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES), AsInteger, in_words("0")] = 0
    """With `stream`: how often the estimate of x_0 is shown on the way."""
    user: str | None = None
    """Accepted, without effect."""
    style: str | None = None
    """Accepted, without effect."""
    moderation: str | None = None
    """Accepted, without effect."""

    @property
    def budget(self) -> Quality:
        """The quality, as one of the three that an answer may have."""
        return MEANINGS.get(self.quality, self.quality)  # type: ignore[arg-type]

    def about(self, model: ModelInfo) -> dict[str, Any]:
        """Return the response members that describe the images' format."""
        background = "transparent" if self.keeps_alpha(model) else "opaque"
        form = {"output_format": self.output_format, "background": background}
        return {"size": size_of(model), "quality": self.budget, **form}

    def keeps_alpha(self, model: ModelInfo) -> bool:
        """Return True if the images in the response have an alpha channel."""
        return model.alpha and self.background != "opaque" and self.output_format != "jpeg"

    @property
    def lossy_quality(self) -> int | None:
        """The quality of JPEG or WebP images in 0..100, or None for PNG."""
        if self.output_format == "png":
            return None
        return 100 if self.output_compression is None else self.output_compression

    @property
    def as_url(self) -> bool:
        """True if the client wants URLs instead of the images themselves."""
        return self.response_format == "url"


class ImagesCall(Sampling, Members):
    """A request to generate images. `extra_body` of OpenAI's clients may add parameters of POST /sample."""

    other_names: ClassVar[Collection[str]] = DIFFUSERS_NAMES

    n: Annotated[Int, in_words("1")] = 1
    """The number of images."""

    def sampling(self, model: ModelInfo, limits: Limits) -> JobCall:
        """Check the members against the model and convert them to a job. Raises InvalidField with all errors."""
        size, errors = size_of(model), ValidationErrors()
        self.check_bounds(bounds_of_images({}, limits), errors)
        lossless, streamed = self.output_format == "png", self.stream
        for name, ok, bound in (
            ("size", self.size in ("auto", size), f"auto or {size}, the size of this model's images"),
            (
                "output_compression",
                not lossless or self.output_compression in (None, 100),
                "absent or 100 for png, which loses nothing",
            ),
            (
                "background",
                self.background != "transparent" or model.alpha,
                "auto or opaque: this model's images have no alpha",
            ),
            (
                "background",
                self.background != "transparent" or self.output_format != "jpeg",
                "auto or opaque with output_format jpeg, which has no alpha",
            ),
            (
                "background",
                self.background != "opaque" or not (self.as_url and model.alpha),
                "auto or transparent with response_format url: a job's images keep their alpha",
            ),
            ("partial_images", streamed or not self.partial_images, "absent or 0 without stream"),
            ("response_format", not (streamed and self.as_url), "b64_json with stream: events have the images in them"),
            ("output_format", lossless or not self.as_url, "png with response_format url: a job gives its images so"),
        ):
            if not ok:
                errors.add(InvalidField.of(name, bound, getattr(self, name)))
        errors.check()
        label = class_label_of(class_of_prompt(self.prompt, model), model.class_names)
        given = self.model_dump(include={*Sampling.model_fields, *Edit.model_fields}, exclude_unset=True)
        can_guide = label is not None and model.null_class is not None
        meant: dict[str, Any] = {}
        if not given.keys() & {*NOT_ADAPTIVE}:
            meant = self._settings(model, can_guide=can_guide)
        return JobCall(**meant | given, class_label=label)

    def _settings(self, model: ModelInfo, *, can_guide: bool) -> dict[str, Any]:
        """Return the parameters of POST /sample that the quality means."""
        if self.quality == "auto":
            return {} if self.deadline_s is None else {"quality": "adaptive"}
        if self.budget == "medium":
            return {}
        own = [rung for rung in model.ladder if rung.model in (None, model.name) and rung.sampler in model.samplers]
        for rung in own if self.budget == "high" else reversed(own):
            settings = settings_of_rung(rung, can_guide=can_guide)
            with suppress(InvalidField):  # its table is gone
                if rung.sampler in TABLE_SAMPLERS:
                    choose_table(model, Recommended(**settings))
                return settings
        return {}


class EditsCall(Edit, ImagesCall):
    """A request to edit an image."""

    input_fidelity: str | None = None
    """Accepted, without effect."""


def bounds_of_images(bounds: Bounds, limits: Limits) -> Bounds:
    """Return the bounds with `n` limited to what OpenAI allows."""
    return {**bounds, "n": Bound({"minimum": 1, "maximum": min(MAX_N, limits.max_n)})}


def size_of(model: ModelInfo) -> str:
    """Return the size of a model's images as OpenAI writes it, such as 32x32."""
    return f"{model.width_px}x{model.height_px}"
