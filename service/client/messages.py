"""What the server reports while a job runs, over the WebSocket and as server-sent events. No I/O."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.client.errors import Problem, UnexpectedAnswer
from service.client.results import JobState
from service.client.sse import ServerSentEvent

CANCEL = '{"type": "cancel"}'  # to the server
SWITCHING_PROTOCOLS = 101


@dataclass(frozen=True, slots=True)
class Accepted:
    """A watched job was accepted. position: how many are ahead; eta_s: seconds until it should be done."""

    id: str
    seed: int
    eta_s: float
    position: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a job after `step` of `steps`; the next step starts at timestep `t`. eta_s: seconds until the end.

    show: `x_t`, the latent, or `x_0`, the network's guess of the image. image: the index of the image, or None where
    `data` is one sheet of all. data: a PNG, or what `frame_format` asked for.
    """

    step: int
    steps: int
    t: int
    show: str
    eta_s: float
    image: int | None
    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """A watched job is done. images: PNGs, one sheet or, with `layout="images"`, one an image."""

    images: tuple[bytes, ...]
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
    t: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A durable job has ended; `job.state` says how."""

    job: JobState


Message = Accepted | Frame | Done | Cancelled
Event = Waiting | Progress | Frame | Ended


@dataclass(frozen=True, slots=True)
class Opening:
    """The JSON part of a message over the WebSocket; `images` binary messages follow it."""

    members: Mapping[str, Any]
    images: int


def opening_of(text: str | bytes) -> Opening:
    """Read the JSON part of a message. Raises UnexpectedAnswer."""
    try:
        members = json.loads(text)
        images = {"frame": 1, "done": members.get("images")}.get(members["type"], 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnexpectedAnswer(SWITCHING_PROTOCOLS) from None
    if not isinstance(images, int):
        raise UnexpectedAnswer(SWITCHING_PROTOCOLS)
    return Opening(members, images)


def message_of(opening: Opening, images: list[str | bytes]) -> Message:
    """Read a message. Raises Problem for an error that the server reports; UnexpectedAnswer."""
    members = opening.members
    pictures = tuple(image for image in images if isinstance(image, bytes))
    if len(pictures) < len(images):
        raise UnexpectedAnswer(SWITCHING_PROTOCOLS)
    try:
        match members["type"]:
            case "accepted":
                return Accepted(**{name: members[name] for name in ("id", "seed", "eta_s", "position", "fingerprint")})
            case "frame":
                return frame(members, pictures[0])
            case "done":
                times = ("queue_s", "first_step_s", "denoise_s", "frames_dropped")
                return Done(images=pictures, **{name: members[name] for name in times})
            case "cancelled":
                return Cancelled(members["id"])
            case "error":
                raise Problem(members, members.get("retry_after_s"))
    except KeyError:
        pass
    raise UnexpectedAnswer(SWITCHING_PROTOCOLS)


def frame(members: Mapping[str, Any], data: bytes) -> Frame:
    """Read a frame. Raises KeyError."""
    return Frame(
        **{name: members[name] for name in ("step", "steps", "t", "show", "eta_s")},
        image=members.get("image"),
        data=data,
    )


def event(sent: ServerSentEvent) -> Event | None:
    """Read a server-sent event of a job; None for a kind that a newer server may add. Raises UnexpectedAnswer."""
    try:
        members = json.loads(sent.data)
        match sent.event:
            case "waiting":
                return Waiting(members["position"], members["eta_s"])
            case "progress":
                return Progress(members["step"], members["steps"], members["t"], members["eta_s"])
            case "frame":
                return frame(members, base64.b64decode(members["data"], validate=True))
            case "done" | "failed" | "cancelled":
                return Ended(JobState.of(members))
    except (ValueError, KeyError, TypeError):
        raise UnexpectedAnswer(200, f"and the event {sent.event[:40]!r} cannot be read") from None
    return None
