"""Messages of the WebSocket and server-sent events, which report on a job. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import checks
from .errors import UnexpectedAnswer, problem_of
from .results import JobState
from .sse import ServerSentEvent

AS_IT_IS = {"check": lambda value: value}  # no JSON
CANCEL = '{"type": "cancel"}'  # the client sends it


@dataclass(frozen=True, slots=True)
class Accepted:
    """A watched job was accepted. position: the number of jobs ahead; eta_s: expected seconds until it is done.

    sampler, steps, guidance: those of the job; None from a server of an earlier version.
    """

    id: str
    seed: int
    eta_s: float
    position: int
    fingerprint: str
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a job after `step` of `steps`; the next step starts at timestep `t`. eta_s: seconds until the end.

    show: `x_t`, the latent, or `x_0`, the network's guess of the image. image: the index of the image, or None where
    `data` is one sheet of all. data: a PNG, or what `frame_format` asked for.
    """

    step: int
    steps: int
    t: float  # the timestep
    show: str
    eta_s: float
    image: int | None
    data: bytes = field(repr=False, metadata=AS_IT_IS)


@dataclass(frozen=True, slots=True)
class Done:
    """A watched job is done. images: PNGs, one sheet or, with `layout="images"`, one an image."""

    images: tuple[bytes, ...] = field(repr=False, metadata=AS_IT_IS)
    queue_s: float
    first_step_s: float
    denoise_s: float
    frames_dropped: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A watched job was cancelled."""

    id: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A durable job waits. position: jobs ahead; eta_s: expected seconds until it is done; None: unknown."""

    position: int | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """A durable job has taken `step` of `steps`; the members are those of a Frame."""

    step: int
    steps: int
    t: float  # the timestep
    eta_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A durable job has ended; `job.state` says how."""

    job: JobState


Message = Accepted | Frame | Done | Cancelled
Event = Waiting | Progress | Frame | Ended


def images_after(members: Mapping[str, Any]) -> int:
    """The number of binary messages that follow a JSON message. Raises KeyError, ValueError."""
    match checks.text(members["type"]):
        case "frame":
            return 1
        case "done":
            return checks.whole(members["images"])
    return 0


def message_of(members: Mapping[str, Any], pictures: tuple[bytes, ...]) -> Message:
    """Read a message. Raises Problem for a message of type `error`, KeyError and ValueError for a malformed one."""
    match members["type"]:
        case "accepted":
            return checks.read(Accepted, members)
        case "frame":
            return frame(members, pictures[0])
        case "done":
            return checks.read(Done, {**members, "images": pictures})
        case "cancelled":
            return checks.read(Cancelled, members)
        case "error":
            raise problem_of(members, checks.optional(checks.number, members.get("retry_after_s")))
    raise ValueError(f"a message of type {members['type']!r:.40}")


def frame(members: Mapping[str, Any], data: bytes) -> Frame:
    """Read a frame. Raises KeyError, ValueError."""
    return checks.read(Frame, {"image": None, **members, "data": data})


def event_of(sent: ServerSentEvent) -> Event | None:
    """Read a server-sent event of a job; None for an unknown kind, which a newer server may add.

    Raises UnexpectedAnswer.
    """
    try:
        members = checks.mapping(checks.loads(sent.data))
        match sent.event:
            case "waiting":
                return checks.read(Waiting, members)
            case "progress":
                return checks.read(Progress, members)
            case "frame":
                return frame(members, checks.decoded(members["data"]))
            case "done" | "failed" | "cancelled":
                return Ended(JobState.of(members))
    except (ValueError, KeyError):
        raise UnexpectedAnswer(200, f"the event {sent.event[:40]!r} cannot be read") from None
    return None
