"""What one request below /v1/images wants, checked and complete, and what is made of its result."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from tminus.service.api.openai.answers import recipe_of
from tminus.service.api.openai.schemas import ImagesRequest, size_of
from tminus.service.images.encoder import Encoder
from tminus.service.model_info import ModelInfo
from tminus.service.spec import Inputs, SampleSpec
from tminus.service.work import JobResult


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job that is wanted, and how its images are to be told."""

    name: str  # of its events: image_generation or image_edit
    members: ImagesRequest
    spec: SampleSpec
    inputs: Inputs | None
    deadline_s: float | None
    job_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def about(self, model: ModelInfo) -> dict[str, Any]:
        """Make the members that an answer has for all its images, and an event for its own."""
        return about(self.members, model)

    def recipe(self, k: int, model: ModelInfo) -> dict[str, Any]:
        """Make the members of a Recipe for image k."""
        return recipe_of(self.spec, k, model.class_names, model.fingerprint, self.job_id)

    @property
    def quality(self) -> int | None:
        """Of its jpegs or webps, 0..100; None for PNGs."""
        if self.members.output_format == "png":
            return None
        return 100 if self.members.output_compression is None else self.members.output_compression

    async def pictures(self, encoder: Encoder, result: JobResult, model: ModelInfo) -> list[bytes]:
        """Encode the images: PNGs are those of POST /sample, to the byte. Raises NotFinite."""
        if self.quality is None:
            return await encoder.encode_pictures("images", self.spec, result, model)
        return await encoder.encode_lossy(self.members.output_format, self.quality, result, self.spec.n)


def about(members: ImagesRequest, model: ModelInfo) -> dict[str, Any]:
    """Make the members that say in which form the images are."""
    return {"size": size_of(model), "quality": members.budget, "output_format": members.output_format}
