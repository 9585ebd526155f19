"""What the server's responses hold."""

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal

import httpx

from service.client.errors import UnexpectedAnswer

PNG, ZIP, JSON = "image/png", "application/zip", "application/json"
MediaType = Literal["image/png", "application/zip", "application/json", "image/webp"]
State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The images of a job: `data` is one sheet, a zip or a JSON document, as `media_type` says.

    The same parameters with this `seed` make the same bytes, as long as `fingerprint` is the same. `job_id` is None for
    an answer from the server's cache. `timings_s` has `queue`, `first_step`, `denoise` and `encode` in seconds; it is
    empty for an answer from the cache and for the image of a durable job.
    """

    data: bytes
    media_type: str
    seed: int
    fingerprint: str
    job_id: str | None
    timings_s: Mapping[str, float]

    @classmethod
    def of(cls, response: httpx.Response) -> "Sampled":
        """Read a response. Raises UnexpectedAnswer."""
        headers = response.headers
        try:
            return cls(
                data=response.content,
                media_type=headers["content-type"],
                seed=int(headers["x-seed"]),
                fingerprint=headers["x-fingerprint"],
                job_id=headers.get("x-job-id"),
                timings_s=_timings_s(headers.get("server-timing", "")),
            )
        except (KeyError, ValueError):
            raise UnexpectedAnswer(response.status_code) from None

    @property
    def files(self) -> dict[str, bytes]:
        """The PNGs of a zip by name, `00000.png` for image 0 and so on. Raises zipfile.BadZipFile if it is not one."""
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            return {PurePosixPath(name).name: archive.read(name) for name in archive.namelist()}

    @property
    def document(self) -> dict[str, Any]:
        """The object of a JSON document. Raises ValueError if it is not one."""
        document: dict[str, Any] = json.loads(self.data)
        return document

    @property
    def pngs(self) -> list[bytes]:
        """The PNGs, one an image; for `image/png` one sheet of all."""
        if self.media_type == ZIP:
            return list(self.files.values())
        if self.media_type == JSON:
            return [base64.b64decode(image["png"]) for image in self.document["images"]]
        return [self.data]


@dataclass(frozen=True, slots=True)
class Noised:
    """An image at timestep t of the forward process, as PNG, and the alpha_bar of t."""

    data: bytes
    seed: int
    alpha_bar: float
    fingerprint: str

    @classmethod
    def of(cls, response: httpx.Response) -> "Noised":
        """Read a response. Raises UnexpectedAnswer."""
        headers = response.headers
        try:
            alpha_bar = float(headers["x-alpha-bar"])
            return cls(response.content, int(headers["x-seed"]), alpha_bar, headers["x-fingerprint"])
        except (KeyError, ValueError):
            raise UnexpectedAnswer(response.status_code) from None


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as GET /jobs/{id} describes it; docs/jobs.md explains the members. `problem` is why it failed."""

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
        """Read a job's document; members that a newer server adds are ignored. Raises UnexpectedAnswer."""
        try:
            return cls(**{field.name: document[field.name] for field in fields(cls)})
        except (KeyError, TypeError):
            raise UnexpectedAnswer(200) from None

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


def object_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a response. Raises UnexpectedAnswer."""
    try:
        document = json.loads(response.content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UnexpectedAnswer(response.status_code)
    return document


def page_of(response: httpx.Response) -> tuple[list[JobState], str | None]:
    """Some jobs, and where the next page begins; None: nowhere. Raises UnexpectedAnswer."""
    document = object_of(response)
    try:
        return [JobState.of(job) for job in document["jobs"]], document["next"]
    except (KeyError, TypeError):
        raise UnexpectedAnswer(response.status_code) from None


def _timings_s(header: str) -> dict[str, float]:
    """The durations of a Server-Timing header, which are in milliseconds."""
    parts = (part.strip().split(";dur=") for part in header.split(",") if ";dur=" in part)
    return {name: float(ms) / 1000 for name, ms in parts}
