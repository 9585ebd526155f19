"""What the server reports while a job runs, over the WebSocket and as server-sent events. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import checks
from .errors import UnexpectedAnswer, problem_of
from .results import JobState
from .sse import ServerSentEvent

AS_IT_IS = {"check": lambda value: value}  # what is no JSON
CANCEL = '{"type": "cancel"}'  # to the server


@dataclass(frozen=True, slots=True)
class Accepted:
    """A watched job was accepted. position: how many are ahead; eta_s: seconds until it should be done.

    sampler, steps, guidance: what is taken; None where a server of an earlier version does not say.
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
    """A durable job waits. position: how many are ahead; eta_s: seconds until it should be done; None if unknown."""

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
    """How many binary messages follow the JSON part of a message. Raises KeyError, ValueError."""
    match checks.text(members["type"]):
        case "frame":
            return 1
        case "done":
            return checks.whole(members["images"])
    return 0


def message_of(members: Mapping[str, Any], pictures: tuple[bytes, ...]) -> Message:
    """Read a message. Raises Problem for an error that the server reports; KeyError, ValueError."""
    match members["type"]:
        case "accepted":
            return Accepted(**checks.members_of(Accepted, members))
        case "frame":
            return frame(members, pictures[0])
        case "done":
            return Done(**checks.members_of(Done, {**members, "images": pictures}))
        case "cancelled":
            return Cancelled(**checks.members_of(Cancelled, members))
        case "error":
            raise problem_of(members, checks.optional(checks.number, members.get("retry_after_s")))
    raise ValueError(f"a message of type {members['type']!r:.40}")


def frame(members: Mapping[str, Any], data: bytes) -> Frame:
    """Read a frame. Raises KeyError, ValueError."""
    return Frame(**checks.members_of(Frame, {"image": None, **members, "data": data}))


def event_of(sent: ServerSentEvent) -> Event | None:
    """Read a server-sent event of a job; None for a kind that a newer server may add. Raises UnexpectedAnswer."""
    try:
        members = checks.mapping(checks.loads(sent.data))
        match sent.event:
            case "waiting":
                return Waiting(**checks.members_of(Waiting, members))
            case "progress":
                return Progress(**checks.members_of(Progress, members))
            case "frame":
                return frame(members, checks.decoded(members["data"]))
            case "done" | "failed" | "cancelled":
                return Ended(JobState.of(members))
    except (ValueError, KeyError):
        raise UnexpectedAnswer(200, f"the event {sent.event[:40]!r} cannot be read") from None
    return None
