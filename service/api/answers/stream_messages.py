"""The text messages of WS /sample/stream."""

from typing import Any

from tminus.service.api.request.advice import warning_of
from tminus.service.errors import MalformedMessage, ServiceError
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Frame
from tminus.service.spec import SampleSpec
from tminus.service.work import Ticket


def key_of(message: dict[str, Any]) -> str:
    """The key in a message of type key. Raises MalformedMessage."""
    secret = message.get("key")
    if message.keys() != {"type", "key"} or not isinstance(secret, str):
        raise MalformedMessage("a message of type key has a key, which is a text, and nothing else")
    return secret


def accepted_message(job_id: str, spec: SampleSpec, ticket: Ticket, model: ModelInfo) -> dict[str, Any]:
    """Say that a job is accepted, and what to expect."""
    return {
        "type": "accepted",
        "id": job_id,
        "seed": spec.seed,
        "eta_s": round(ticket.outlook.eta_s, 3),
        "position": ticket.outlook.position,
        "fingerprint": model.fingerprint,
    } | ({"warning": warning} if (warning := warning_of(spec, model)) is not None else {})


def frame_message(frame: Frame, spec: SampleSpec, t: float, show: str, eta_s: float) -> dict[str, Any]:
    """Say what the picture after this message shows. t: the timestep of the next step."""
    return {
        "type": "frame",
        "step": frame.step,
        "steps": spec.num_passes,
        "t": round(t, 3),
        "show": show,
        "eta_s": round(eta_s, 3),
    }


def error_message(error: ServiceError) -> dict[str, Any]:
    """The problem's members, but for its type, which a message has of its own."""
    message = error.problem() | {"type": "error"}
    if "Retry-After" in error.headers:
        message["retry_after_s"] = int(error.headers["Retry-After"])
    return message
