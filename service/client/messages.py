"""What a job says on its way: over the WebSocket, and as server-sent events."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.client.errors import UnexpectedAnswer
from service.client.results import JobState
from service.client.sse import ServerSentEvent


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that is watched was taken. position: how many are ahead; eta_s: seconds until it should be done."""

    id: str
    seed: int
    eta_s: float
    position: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a job after `step` of `steps`; the next step starts at timestep `t`, the end is eta_s seconds off.

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
    """A job that was watched is done. images: PNGs, one sheet or, with `layout="images"`, one an image."""

    images: tuple[bytes, ...]
    queue_s: float
    first_step_s: float
    denoise_s: float
    frames_dropped: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A job that was watched was given up."""

    id: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A durable job waits. position: how many are ahead; eta_s: seconds until it should be done; None: not known."""

    position: int | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """A durable job has taken `step` of `steps`; as a Frame, without the picture."""

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


def accepted(message: Mapping[str, Any]) -> Accepted:
    """Read an `accepted` message."""
    return Accepted(**{name: message[name] for name in Accepted.__dataclass_fields__})


def frame(message: Mapping[str, Any], data: bytes) -> Frame:
    """Read a frame's message; its picture came apart from it."""
    members = {name: message[name] for name in ("step", "steps", "t", "show", "eta_s")}
    return Frame(**members, image=message.get("image"), data=data)


def done(message: Mapping[str, Any], images: tuple[bytes, ...]) -> Done:
    """Read a `done` message; its pictures came apart from it."""
    times = {name: message[name] for name in ("queue_s", "first_step_s", "denoise_s", "frames_dropped")}
    return Done(images=images, **times)


def event(sent: ServerSentEvent) -> Event | None:
    """Read a server-sent event of a job; None for one that a newer server may know. Raises UnexpectedAnswer."""
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
