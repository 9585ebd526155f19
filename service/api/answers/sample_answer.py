"""The JSON that /sample answers, as pydantic models: images, and with `every` the frames before them."""

from typing import Any

from pydantic import BaseModel, Field


class SampledImage(BaseModel):
    """One image."""

    index: int
    class_label: int | None
    class_name: str | None
    png: str = Field(description="base64", json_schema_extra={"format": "byte"})


class PathFrame(BaseModel):
    """All images of a request after the same number of steps, as contact sheets."""

    step: int = Field(description="how many steps they have taken")
    t: float = Field(description="the timestep of the next step")
    x_t: str | None = Field(default=None, description="the noisy images: base64 of a PNG, if they were asked for")
    x_0: str | None = Field(default=None, description="the network's estimate: base64 of a PNG, if it was asked for")


class SampleAnswer(BaseModel):
    """Images as JSON, and what is needed to make them again."""

    spec: dict[str, Any] = Field(description="the request as the server understood it")
    weights: str = Field(description="SHA-256 of the weights")
    fingerprint: str
    images: list[SampledImage]
    sheet: str | None = Field(
        default=None, description="with `every`: what image/png answers, base64", json_schema_extra={"format": "byte"}
    )
    frames: list[PathFrame] | None = Field(default=None, description="with `every`: what came before")
