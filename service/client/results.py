"""The return values of the client's calls, and the messages and events of a job."""

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from . import checks
from .errors import UnexpectedAnswer, expecting

PNG, ZIP, JSON = "image/png", "application/zip", "application/json"
MediaType = Literal[
    "image/png",
    "application/zip",
    "application/json",
    "application/x-npy",
    "image/webp",
    "application/vnd.tminus.trajectory",
]
State = Literal["waiting", "running", "done", "failed", "cancelled"]
Loaded = Literal["loaded", "loading", "unloading", "unloaded"]
NAME = {"check": checks.model_name}
AS_IT_IS = {"check": lambda value: value}  # for bytes, which do not come from JSON
FILE_IN_ZIP = re.compile(r"[0-9]{5,10}\.png")
ZIP_END = struct.Struct("<4s4xHHLLH")  # the last record of a zip without a comment (PKZIP's APPNOTE.TXT, 4.3.16)
# Header of an .npy file (NumPy's format, version 1.0) with four dimensions of float32 in C order.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, "
    rb"'shape': \(([0-9]{1,9}(?:, [0-9]{1,9}){3})\), \} *\n",
    re.DOTALL,
)
ZIP64_LOCATOR = b"PK\x06\x07"
OK = 200
MAX_IMAGES = 4096  # assumed maximum if the number of images is unknown


@dataclass(frozen=True, slots=True)
class Sampled:
    """The images of a job.

    `data` is a sheet, a zip, JSON, floats, an animation or a trajectory; see `media_type`. The same parameters, with
    this `seed`, give the same bytes on any exact server with the same `fingerprint`. `job_id` is None if the response
    comes from the server's cache. `sampler`, `steps` and `guidance` are the values that the job used; None if the
    server is too old to send them. `quality` is the place of this setting in the model's ladder, such as `2/5`; None if
    the ladder does not have it. `timings_s` has the durations in seconds of `queue`, `first_step`, `denoise`,
    `decode` (only for latent models) and `encode`. It is empty for a response from the cache and for a durable job.
    """

    data: bytes = field(repr=False)
    media_type: str
    seed: int
    fingerprint: str
    job_id: str | None
    timings_s: Mapping[str, float]
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    quality: str | None = None

    @classmethod
    def of(cls, response: httpx.Response, accept: str) -> "Sampled":
        """Parse a response. accept: the media type that was requested. Raises UnexpectedAnswer."""
        headers = response.headers
        with expecting(response.status_code):
            if headers["content-type"] != accept:
                raise ValueError(f"{headers['content-type']!r:.40}, where {accept} was asked for")
            return cls(
                data=checks.picture(response.content, accept),
                media_type=accept,
                seed=checks.whole(int(headers["x-seed"])),
                fingerprint=checks.token(headers["x-fingerprint"]),
                job_id=checks.optional(checks.token, headers.get("x-job-id")),
                timings_s=_timings_s(headers.get("server-timing", "")),
                sampler=checks.optional(checks.token, headers.get("x-sampler")),
                steps=checks.whole(int(headers["x-steps"])) if "x-steps" in headers else None,
                guidance=checks.number(float(headers["x-guidance"])) if "x-guidance" in headers else None,
                quality=checks.optional(checks.token, headers.get("x-quality")),
            )

    @property
    def files(self) -> dict[str, bytes]:
        """The PNGs in a zip, keyed by name: image 0 is `00000.png`. Raises UnexpectedAnswer without a zip."""
        try:
            return _files(self.data)
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
            raise UnexpectedAnswer(OK, f"not a zip of images ({error})") from None

    @property
    def document(self) -> dict[str, Any]:
        """The parsed JSON document. Raises UnexpectedAnswer if `data` is not a JSON object."""
        try:
            return checks.mapping(checks.loads(self.data))
        except ValueError as error:
            raise UnexpectedAnswer(OK, f"not a JSON document ({error})") from None

    @property
    def floats(self) -> "memoryview[float]":
        """The floats of application/x-npy, [n, C, H, W]. `numpy.asarray` converts them without a copy.

        Raises UnexpectedAnswer if `data` is not such an array.
        """
        found = NPY_HEADER.match(self.data)
        shape = [int(side) for side in found[1].split(b",")] if found is not None else []
        if found is None or 0 in shape or len(self.data) - found.end() != 4 * math.prod(shape):
            raise UnexpectedAnswer(OK, "not an array of floats, or not all of it")
        return memoryview(self.data)[found.end() :].cast("f", shape)

    @property
    def pngs(self) -> list[bytes]:
        """The images of a PNG, zip or JSON response, as PNGs; `image/png` has one sheet.

        Raises UnexpectedAnswer for a malformed zip or JSON document.
        """
        if self.media_type == ZIP:
            return list(self.files.values())
        if self.media_type == JSON:
            try:
                encoded = [checks.mapping(image)["png"] for image in checks.items(self.document["images"])]
                return [checks.picture(checks.decoded(each), PNG) for each in encoded]
            except (KeyError, ValueError) as error:
                raise UnexpectedAnswer(OK, f"a document without its images ({error})") from None
        return [self.data]


@dataclass(frozen=True, slots=True)
class Noised:
    """An image at timestep t of the forward process, as a PNG, and the value of alpha_bar at t."""

    data: bytes = field(repr=False)
    seed: int
    alpha_bar: float
    fingerprint: str

    @classmethod
    def of(cls, response: httpx.Response) -> "Noised":
        """Parse a response of POST /noise. Raises UnexpectedAnswer."""
        headers = response.headers
        with expecting(response.status_code):
            return cls(
                data=checks.picture(response.content, PNG),
                seed=checks.whole(int(headers["x-seed"])),
                alpha_bar=checks.number(float(headers["x-alpha-bar"])),
                fingerprint=checks.token(headers["x-fingerprint"]),
            )


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job, as in GET /jobs/{id}; the API reference explains its members.

    `problem` is the error of a failed job.
    """

    id: str
    model: str = field(metadata=NAME)
    state: State
    durable: bool
    step: int | None  # None if the job ended early
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
    webhook: Mapping[str, Any] | None = None  # the URL and the state of the delivery

    @classmethod
    def of(cls, document: Any) -> "JobState":
        """Parse the state of a job. Unknown members are ignored, because a newer server may add some.

        Raises UnexpectedAnswer.
        """
        with expecting(OK):
            return checks.read(cls, document)

    @property
    def ended(self) -> bool:
        """True if the job is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


def object_of(response: httpx.Response) -> dict[str, Any]:
    """Parse a response that is a JSON object. Raises UnexpectedAnswer."""
    with expecting(response.status_code):
        return checks.mapping(checks.loads(response.content))


def page_of(response: httpx.Response) -> tuple[list[JobState], str | None]:
    """Parse a page of jobs. Returns the jobs, and the next page's cursor or None. Raises UnexpectedAnswer."""
    document = object_of(response)
    with expecting(response.status_code):
        jobs = [JobState.of(job) for job in checks.items(document["jobs"])]
        after = checks.optional(checks.token, document["next"])
    if after is not None and not jobs:  # otherwise a server could send empty pages forever
        raise UnexpectedAnswer(response.status_code)
    return jobs, after


def _files(data: bytes) -> dict[str, bytes]:
    """Unpack a zip of uncompressed PNGs from the server. Raises ValueError, BadZipFile and other errors."""
    end = data[-ZIP_END.size :]
    if len(end) < ZIP_END.size or not end.startswith(b"PK\x05\x06"):
        raise ValueError("its end is missing")
    _, _, _, directory_bytes, _, _ = ZIP_END.unpack(end)
    if directory_bytes > 100 * MAX_IMAGES or data[-ZIP_END.size - 20 :].startswith(ZIP64_LOCATOR):
        raise ValueError(f"more than {MAX_IMAGES} files in it")  # zipfile would create an object for each entry
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.flag_bits & 1 or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename!r:.40} is encrypted or compressed")
            if not FILE_IN_ZIP.fullmatch(entry.filename):
                raise ValueError(f"{entry.filename!r:.40} is no name of an image")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("a name comes twice")
        if sum(entry.file_size for entry in entries) > len(data):  # entries overlap
            raise ValueError("its files are larger than itself")
        return {entry.filename: checks.picture(archive.read(entry), PNG) for entry in entries}


def _timings_s(header: str) -> dict[str, float]:
    """Parse a Server-Timing header, and convert its durations from milliseconds to seconds."""
    parts = (part.strip().split(";dur=") for part in header.split(",") if ";dur=" in part)
    return {name: checks.number(float(ms)) / 1000 for name, ms in parts}


@dataclass(frozen=True, slots=True)
class ModelState:
    """The state of a model, as in GET /models.

    `info` is the document of GET /model; None if the model is not served. An `unloaded` model may still be served: the
    first request loads it.
    """

    name: str = field(metadata=NAME)
    default: bool  # True if calls without a model name use this model
    state: Loaded
    info: Mapping[str, Any] | None
    url: str | None = None  # path of the model's web page and API; None if the model is not served

    @classmethod
    def of(cls, document: Any) -> "ModelState":
        """Parse the state of a model. Unknown members are ignored, because a newer server may add some.

        Raises UnexpectedAnswer.
        """
        with expecting(OK):
            members = checks.mapping(document)
            model = checks.read(cls, members | {"info": members["model"]})
            if model.state == "loaded" and model.info is None:
                raise ValueError(f"{model.name} is {model.state}, with no description")
        return model


def models_of(response: httpx.Response) -> list[ModelState]:
    """Parse a list of models. Raises UnexpectedAnswer, for example if a name appears twice."""
    document = object_of(response)
    with expecting(response.status_code):
        models = [ModelState.of(model) for model in checks.items(document["models"])]
        if len({model.name for model in models}) < len(models):
            raise ValueError("a name comes twice")
    return models


# --- the messages of a WebSocket and the events of a durable job ---


@dataclass(frozen=True, slots=True)
class Accepted:
    """The watched job was accepted.

    position: number of jobs ahead of it. eta_s: expected seconds until it is done. sampler, steps, guidance: the values
    that the job uses; None if the server is too old to send them. quality: see Sampled.
    """

    id: str
    seed: int
    eta_s: float
    position: int
    fingerprint: str
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    quality: str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a running job, after `step` of `steps` steps.

    t: the timestep at which the next step starts. eta_s: expected seconds until the job is done. show: `x_t` (the
    latent) or `x_0` (the network's prediction of the image). image: index of the image; None if `data` is one sheet of
    all images. data: a PNG, or a file in the requested `frame_format`.
    """

    step: int
    steps: int
    t: float
    show: str
    eta_s: float
    image: int | None
    data: bytes = field(repr=False, metadata=AS_IT_IS)


@dataclass(frozen=True, slots=True)
class Done:
    """The watched job is done. images: one PNG sheet, or one PNG per image with `layout="images"`."""

    images: tuple[bytes, ...] = field(repr=False, metadata=AS_IT_IS)
    queue_s: float
    first_step_s: float
    denoise_s: float
    frames_dropped: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The watched job was cancelled."""

    id: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """The durable job is waiting. position: number of jobs ahead. eta_s: expected seconds until it is done.

    Either is None if it is unknown.
    """

    position: int | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """The durable job has taken `step` of `steps` steps. t and eta_s: see Frame."""

    step: int
    steps: int
    t: float
    eta_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The durable job has ended. `job.state` is done, failed or cancelled."""

    job: JobState


Message = Accepted | Frame | Done | Cancelled
Event = Waiting | Progress | Frame | Ended
