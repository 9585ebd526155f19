"""Descriptions of the response headers for the OpenAPI document."""

from collections.abc import Mapping
from typing import Any

WHOLE, TEXT = {"type": "integer"}, {"type": "string"}

HEADERS: Mapping[str, tuple[dict[str, Any], str]] = {
    # --- all responses ---
    "API-Version": (TEXT, "The version of the native API."),
    "X-Request-ID": (
        TEXT,
        "The id of the request: the client's own, if it sent one of 1 to 64 letters, digits and `._:-` that has no key "
        "in it, or a new one.",
    ),
    "X-Content-Type-Options": (TEXT, "`nosniff`: browsers keep to the `Content-Type`."),
    "RateLimit-Policy": (TEXT, "Of a key with a quota: the row-steps of a window (`q`), and its seconds (`w`)."),
    "RateLimit": (TEXT, "Of a key with a quota: the row-steps that are left (`r`), and seconds until all are (`t`)."),
    # --- the values used for the request ---
    "X-Seed": (WHOLE, "The seed, given or drawn."),
    "X-Sampler": (TEXT, "The sampler that was taken."),
    "X-Steps": (WHOLE, "The number of steps that was taken."),
    "X-Guidance": ({"type": "number"}, "The guidance that was taken. 1.0 is off."),
    "X-Quality": (
        TEXT,
        "The place of the setting in the `ladder` of `GET /model`, such as `2/5`; 1 is the best. For a student that a "
        "served model's ladder names, it is that ladder. Absent where the setting is not in it.",
    ),
    "X-Warning": (TEXT, "Why the images are probably not what was wanted. Absent where there is no reason."),
    # --- images ---
    "X-Job-ID": (TEXT, "The id of the job. Absent where no job ran."),
    "X-Queue-Position": (WHOLE, "How many jobs were ahead at arrival. Absent where no job ran."),
    "X-ETA-Seconds": ({"type": "number"}, "The forecast at arrival. Absent where no job ran."),
    "Server-Timing": (
        TEXT,
        "Milliseconds that the job took: `queue`, `first_step`, `denoise`, of a latent model `decode`, and `encode`. "
        "Absent where no job ran.",
    ),
    "X-Fingerprint": (
        TEXT,
        "A hash of all that changes the bytes for the same request and weights: software, machine, settings.",
    ),
    "X-Alpha-Bar": ({"type": "number"}, "alpha_bar_t: the share of the image in the variance of x_t."),
    "X-Value-Range": (TEXT, "Of `application/x-npy`: the values of black and of white."),
    "X-Clipped": (TEXT, "Of `application/x-npy`: whether values beyond the range were clipped to it."),
    "X-Shown-Channels": (TEXT, "How many channels the pictures show, of how many. Absent where they show all."),
    "Vary": (TEXT, "The request headers that the answer depends on."),
    "ETag": (TEXT, "The name of these bytes. Present with a given `seed`, where the server guarantees the same bytes."),
    "Cache-Control": (TEXT, "`no-cache` with an `ETag`: ask again with `If-None-Match`. Otherwise `no-store`."),
    "Cache-Status": (TEXT, "`tminus; hit` where the answer comes from the result cache."),
    "Inference-Header-Content-Length": (WHOLE, "The bytes of JSON, where bytes of tensors follow it."),
    # --- durable jobs ---
    "Location": (TEXT, "Where the job is."),
    "Idempotent-Replayed": (TEXT, "`true` where an earlier request made this job."),
    # --- errors ---
    "Retry-After": (WHOLE, "Seconds until it makes sense to try again. Absent where the server cannot say."),
    "WWW-Authenticate": (TEXT, "How to send a key."),
    "Accept": (TEXT, "The media types that a body may have here."),
    "Accept-Encoding": (TEXT, "The codings that a body may have: `identity`."),
    # --- other responses ---
    "Set-Cookie": (TEXT, "The cookie `tminus_key`, which pages on other origins cannot use."),
}
OF_ANY = ("API-Version", "X-Request-ID", "X-Content-Type-Options")
OF_OTHERS = OF_ANY[1:]  # for the APIs of other vendors
OF_QUOTA = ("RateLimit-Policy", "RateLimit")
TAKEN = ("X-Seed", "X-Sampler", "X-Steps", "X-Guidance", "X-Quality", "X-Warning")
OF_JOB = ("X-Job-ID", *TAKEN, "X-Fingerprint")
OF_FORECAST = ("X-Queue-Position", "X-ETA-Seconds", "Server-Timing")
NAMED = ("ETag", "Cache-Control")  # for responses that clients may cache
OF_PICTURES = ("X-Shown-Channels", "Vary")
OF_FLOATS = ("X-Value-Range", "X-Clipped")
# The headers of problem documents, keyed by status code.
OF_REFUSALS: Mapping[int, tuple[str, ...]] = {
    401: ("WWW-Authenticate",),
    409: ("Retry-After",),
    415: ("Accept", "Accept-Encoding"),
    429: ("Retry-After",),
    503: ("Retry-After",),
    507: ("Retry-After",),
}


def with_headers(*names: str) -> dict[str, Any]:
    """Return the `headers` member of an OpenAPI response."""
    return {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}}


def components() -> dict[str, Any]:
    """Return the components that `with_headers` refers to."""
    return {name: {"schema": schema, "description": description} for name, (schema, description) in HEADERS.items()}
