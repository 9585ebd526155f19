"""How much a server may send: what can answer a request, so that no server fills the memory. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIB = 2**20
IMAGE_BYTES = 16 * MIB  # one image in a file: 2048 x 2048 pixels in colour, with its text
ANSWER_BYTES = 512 * MIB  # any answer or message
ANIMATION_BYTES = 64 * MIB  # which a server makes of 16 MiB of pixels at most
TRAJECTORY_BYTES = 64 * MIB  # of which a server makes 32 MiB at most
DOCUMENT_BYTES = 16 * MIB  # JSON without images
EVENT_BYTES = 64 * MIB  # a server-sent event: a frame as base64
MAX_IMAGES, MAX_STEPS = 4096, 100_000  # of a request that does not say


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, as far as it bounds what answers it."""

    images: int  # n
    passes: int  # that an image takes, at most; frames count these as steps
    every: int  # steps between two frames, at least
    shows: frozenset[str]  # what frames may show
    in_sheets: bool  # one picture of all images, not one each
    frame_type: str  # media type of a frame

    @classmethod
    def of(cls, parameters: Mapping[str, Any], show: str | None = "x_t") -> "Asked":
        """Read it from the parameters of a call; `show` holds where they have none."""
        shows = parameters.get("show", show)
        # A sampler takes two passes a step and one more at most; with `nearest` the server chooses the steps.
        passes = MAX_STEPS if parameters.get("nearest") else 2 * _whole(parameters.get("steps"), MAX_STEPS) + 1
        return cls(
            images=_whole(parameters.get("n", 1), MAX_IMAGES),
            passes=passes,
            every=_whole(parameters.get("every"), 1),
            shows=frozenset([shows] if isinstance(shows, str) else shows or ()),
            in_sheets=parameters.get("layout", "sheet") == "sheet",
            frame_type=f"image/{parameters.get('frame_format', 'png')}",
        )

    @property
    def pictures(self) -> int:
        """How many pictures a step is shown in, for each of `shows`."""
        return 1 if self.in_sheets else self.images

    @property
    def picture_bytes(self) -> int:
        """How long one of them may be."""
        return min(self.images * IMAGE_BYTES, ANSWER_BYTES) if self.in_sheets else IMAGE_BYTES

    def answer_bytes(self, media_type: str) -> int:
        """How long an answer of a media type may be."""
        if media_type == "image/webp":
            return ANIMATION_BYTES
        if media_type == "application/vnd.tminus.trajectory":
            return TRAJECTORY_BYTES
        encoded = 4 * IMAGE_BYTES // 3 if media_type == "application/json" else IMAGE_BYTES
        return min(self.images * encoded, ANSWER_BYTES)


def _whole(given: object, otherwise: int) -> int:
    """A parameter as a number; another value than a number from 1 up is for the server to refuse."""
    try:
        number = int(given)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return number if number >= 1 else otherwise
