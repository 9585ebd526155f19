"""What the server's answers hold."""

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal

from service.client.effects import Answer
from service.client.errors import UnexpectedAnswer

PNG, ZIP, JSON = "image/png", "application/zip", "application/json"
MediaType = Literal["image/png", "application/zip", "application/json", "image/webp"]
State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The images of a job: `data` is what `media_type` says, one sheet, a zip or a JSON document.

    The same parameters with this `seed` make the same bytes, as long as `fingerprint` is the same. `job_id` is None for
    an answer that the server had kept. `timings_s` has `queue`, `first_step`, `denoise` and `encode` in seconds, or
    nothing, for an image of a durable job.
    """

    data: bytes
    media_type: str
    seed: int
    fingerprint: str
    job_id: str | None
    timings_s: Mapping[str, float]

    @classmethod
    def of(cls, answer: Answer) -> "Sampled":
        """Read an answer. Raises UnexpectedAnswer."""
        headers = answer.headers
        try:
            return cls(
                data=answer.content,
                media_type=headers["content-type"],
                seed=int(headers["x-seed"]),
                fingerprint=headers["x-fingerprint"],
                job_id=headers.get("x-job-id"),
                timings_s=_timings_s(headers.get("server-timing", "")),
            )
        except (KeyError, ValueError):
            raise UnexpectedAnswer(answer.status) from None

    @property
    def files(self) -> dict[str, bytes]:
        """Of a zip, the PNGs by name, `00000.png` for image 0 and so on. Raises zipfile.BadZipFile for another one."""
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            return {PurePosixPath(name).name: archive.read(name) for name in archive.namelist()}

    @property
    def document(self) -> dict[str, Any]:
        """Of a JSON answer, the object. Raises ValueError for another one."""
        document: dict[str, Any] = json.loads(self.data)
        return document

    @property
    def pngs(self) -> list[bytes]:
        """The PNGs, image by image; of `image/png` the one that there is, a sheet of all."""
        if self.media_type == ZIP:
            return list(self.files.values())
        if self.media_type == JSON:
            return [base64.b64decode(image["png"]) for image in self.document["images"]]
        return [self.data]


@dataclass(frozen=True, slots=True)
class Noised:
    """An image at timestep t of the forward process, as PNG; alpha_bar is that of t."""

    data: bytes
    seed: int
    alpha_bar: float
    fingerprint: str

    @classmethod
    def of(cls, answer: Answer) -> "Noised":
        """Read an answer. Raises UnexpectedAnswer."""
        headers = answer.headers
        try:
            alpha_bar = float(headers["x-alpha-bar"])
            return cls(answer.content, int(headers["x-seed"]), alpha_bar, headers["x-fingerprint"])
        except (KeyError, ValueError):
            raise UnexpectedAnswer(answer.status) from None


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as GET /jobs/{id} tells it; docs/jobs.md says what the members mean. `problem` is why it failed."""

    id: str
    state: State
    durable: bool
    step: int | None  # null where it ended early
    steps: int
    n: int
    sampler: str
    seed: int
    position: int | None
    eta_s: float | None
    age_s: float
    created: str
    finished: str | None
    fingerprint: str | None
    parameters: Mapping[str, Any]
    problem: Mapping[str, Any] | None

    @classmethod
    def of(cls, document: Any) -> "JobState":
        """Read a job's document; members of a newer server are left out. Raises UnexpectedAnswer."""
        try:
            return cls(**{field.name: document[field.name] for field in fields(cls)})
        except (KeyError, TypeError):
            raise UnexpectedAnswer(200) from None

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


def object_of(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer. Raises UnexpectedAnswer."""
    try:
        document = json.loads(answer.content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UnexpectedAnswer(answer.status)
    return document


def _timings_s(header: str) -> dict[str, float]:
    """The durations of a Server-Timing header, which are in milliseconds."""
    parts = (part.strip().split(";dur=") for part in header.split(",") if ";dur=" in part)
    return {name: float(ms) / 1000 for name, ms in parts}
