"""Descriptions of WebSocket messages and server-sent events for the OpenAPI document.

OpenAPI has no way to describe such messages. Two extensions hold the descriptions instead: `x-websockets` of the
document, keyed by path, and `x-events` of a response, keyed by event name.
"""

from collections.abc import Mapping
from typing import Any

from tminus.service.api.answers.operations import described

Described = dict[str, Any]

MEMBERS: Mapping[str, tuple[str | None, str]] = {  # member: (JSON type, or None for any type; description)
    "id": ("string", "The id of the job, for `GET /jobs/{job_id}`."),
    "seed": ("integer", "The seed, given or drawn."),
    "sampler": ("string", "The sampler that is taken."),
    "steps_taken": ("integer", "The number of steps that is taken."),
    "guidance": ("number", "The guidance that is taken. 1.0 is off."),
    "quality": ("string", "The place of the setting in the model's ladder, such as `2/5`. Absent where it has none."),
    "eta_s": ("number", "Seconds until the job should be done."),
    "position": ("integer", "How many jobs go before it."),
    "fingerprint": ("string", "What the bytes depend on besides the request."),
    "warning": ("string", "Why the images are probably not what was wanted. Absent where there is no reason."),
    "step": (
        "number",
        "The steps taken, counted in passes. While the images of a job are at different steps, their mean.",
    ),
    "steps": ("integer", "The passes in all. An edit with `strength` counts only those that it runs."),
    "t": ("number", "The timestep of the next step."),
    "show": ("string", "What the picture shows: `x_t` or `x_0`."),
    "image": ("integer", "The index of the image. Only with `layout=images`."),
    "media_type": ("string", "The media type of the picture or pictures."),
    "data": ("string", "The picture, as base64."),
    "images": ("integer", "How many pictures follow."),
    "queue_s": ("number", "Seconds from the request to the first step."),
    "first_step_s": ("number", "Seconds of the first step."),
    "denoise_s": ("number", "Seconds of all steps."),
    "frames_dropped": ("integer", "How many frames were left out, because the client read too slowly."),
    "status": ("integer", "The status that the error has over HTTP."),
    "title": ("string", "What is wrong, in general."),
    "code": ("string", "The stable code of the error."),
    "detail": ("string", "What is wrong, for people."),
    "field": ("string", "What has to be changed. Absent where that is not one thing, as the next two."),
    "value": (None, "What was received, shortened."),
    "bound": ("string", "What it must be."),
    "errors": ("array", "All that is wrong with the parameters, each as a problem document has it."),
    "retry_after_s": ("integer", "Seconds until it makes sense to try again. Absent where the server cannot say."),
}
ONCE = ("step", "steps", "t", "eta_s")


def _message(
    description: str, *names: str, kind: str | None = None, followed_by: str | None = None, nullable: bool = False
) -> Described:
    properties: Described = {} if kind is None else {"type": {"const": kind}}
    for name in names:
        of_type, words = MEMBERS[name]
        schema: Described = {} if of_type is None else {"type": of_type}
        if nullable:
            schema = {"anyOf": [schema, {"type": "null"}]}
        properties[name.removesuffix("_taken")] = schema | {"description": words}
    made: Described = {"description": description, "schema": {"type": "object", "properties": properties}}
    return made if followed_by is None else made | {"followed_by": followed_by}


EVENTS: Described = {
    "waiting": _message(
        "The job waits. Sent each time one of the members changes. One that is not known is null.",
        *("position", "eta_s"),
        nullable=True,
    ),
    "progress": _message("A step was taken. If the job is already running, one comes at once.", *ONCE),
    "frame": _message("Replaces `progress` where `show` is given.", *ONCE, "show", "image", "media_type", "data"),
    **{
        state: {
            "description": "The job has ended. The stream ends.",
            "schema": {"$ref": "#/components/schemas/JobAnswer"},
        }
        for state in ("done", "failed", "cancelled")
    },
}

STREAM: Described = {
    "operationId": "stream_samples",
    "tags": ["sample"],
    **{name: described("stream_samples")[name] for name in ("summary", "description")},
    "client": {
        "parameters": {
            "description": "Asks for a job. The first message, or the next after a job with `keep_open`.",
            "schema": {"$ref": "#/components/schemas/StreamRequest"},
        },
        "cancel": _message("Cancels the job that runs.", kind="cancel"),
        "key": {
            "description": "A key, where the handshake has none, as from a page of another origin. The first message, "
            "of at most 1 KiB.",
            "schema": {"type": "object", "properties": {"type": {"const": "key"}, "key": {"type": "string"}}},
        },
    },
    "server": {
        "accepted": _message(
            "The job was accepted.",
            *("id", "seed", "sampler", "steps_taken", "guidance", "eta_s", "position", "fingerprint"),
            *("quality", "warning"),
            kind="accepted",
        ),
        "frame": _message(
            "A picture of the job on its way.", *ONCE, "show", "image", kind="frame", followed_by="1 binary message"
        ),
        "done": _message(
            "The job is done. The pictures are PNGs, with the same bytes as from `POST /sample`.",
            *("images", "media_type", "queue_s", "first_step_s", "denoise_s", "frames_dropped"),
            kind="done",
            followed_by="`images` binary messages",
        ),
        "cancelled": _message("The job was cancelled.", "id", kind="cancelled"),
        "error": _message(
            "The job was refused or failed. The connection closes.",
            *("title", "status", "code", "detail", "field", "value", "bound", "errors", "retry_after_s"),
            kind="error",
        ),
    },
    "close": {
        "1000": "After `done` or `cancelled`, unless `keep_open`.",
        "1007": "A text message is not UTF-8.",
        "1008": "The request or its key was refused; or more than 64 pings and pongs came in a second; or nothing was "
        "asked for within ten seconds of connecting, or within a minute of the last job (`silence`).",
        "1009": "The message had too many fragments, or an image over `--max-image-bytes`, or besides its images over "
        "1 MiB, or over an eighth of that if it is more. If the server stops reading the message for its size, no "
        "`error` comes first.",
        "1011": "The job failed, or its deadline passed.",
        "1012": "The server stopped. A running job first gets `--grace-s` seconds.",
        "1013": "Try again later: the server is overloaded or shutting down, a quota is used up, a deadline cannot be "
        "met, or the model was unloaded; also for a job that outlasted the grace period.",
    },
}
WEBSOCKETS: Described = {"/sample/stream": STREAM}
