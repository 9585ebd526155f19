"""What the headers of a request ask for: media types, a durable job, the same job for the same Idempotency-Key."""

import json
import re
from collections.abc import Sequence
from hashlib import sha256

from fastapi import Request

from tminus.service.api.request.schemas import SampleRequest
from tminus.service.errors import (
    InvalidField,
    NotAcceptable,
    UnsupportedEncoding,
)
from tminus.service.jobs.store.records import Key
from tminus.service.jobs.webhooks.webhook import Webhook

KEY = re.compile(r"[\x20-\x7e]{1,255}")


def accept_header(request: Request) -> str:
    """Read the media types that the client accepts; several headers are one list."""
    return ", ".join(request.headers.getlist("accept"))


def negotiate(accept: str, offered: Sequence[str], hint: str = "") -> str:
    """Pick the offered type the client likes best, the earlier one on a tie.

    Raises NotAcceptable if it likes none; the hint says what else there is.

    An offered type's quality is that of the most specific range that matches it; an empty header accepts anything.
    """
    if not accept.strip():
        return offered[0]
    ranges = qualities(accept)

    def quality(media_type: str) -> float:
        kind = media_type.partition("/")[0]
        for pattern in (media_type, f"{kind}/*", "*/*"):
            matching = [q for name, q in ranges if name == pattern]
            if matching:
                return max(matching)
        return 0.0

    best = max(offered, key=quality)  # max keeps the first of equals
    if quality(best) <= 0:
        bound = f"one of {', '.join(offered)}{hint}"
        raise NotAcceptable(
            f"Accept must allow {bound}, got {accept[:200]!r}", field="Accept", value=accept, bound=bound
        )
    return best


def qualities(header: str) -> list[tuple[str, float]]:
    """List the names in a header such as Accept or Accept-Encoding, in small letters, with their quality in 0..1."""
    return [_parse(part) for part in header.split(",") if part.strip()]


def _parse(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                q = float(value)
            except ValueError:
                return name, 0.0
            return name, q if 0 <= q <= 1 else 0.0
    return name, 1.0


def prefers_async(request: Request) -> bool:
    """Say whether Prefer has respond-async (RFC 7240, section 4.1)."""
    headers = ",".join(request.headers.getlist("prefer"))
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in headers.split(","))


def check_encoding(request: Request) -> None:
    """Raise UnsupportedEncoding for a compressed body."""
    for encoding in ",".join(request.headers.getlist("content-encoding")).split(","):
        if encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding(encoding.strip())


def key_in_headers(request: Request) -> str | None:
    """Read the Idempotency-Key; a structured-field string may be quoted or not. Raises InvalidField."""
    header = request.headers.get("idempotency-key")
    if header is None:
        return None
    name = header.strip().removeprefix('"').removesuffix('"').strip()
    if not KEY.fullmatch(name):
        raise InvalidField.of("Idempotency-Key", "1 to 255 printable ASCII characters", header)
    return name


def idempotency_key(
    request: Request,
    asked: SampleRequest,
    owner: str,
    webhook: Webhook | None = None,
    chosen: str | None = None,
    *,
    transparent: bool = False,
) -> Key | None:
    """Read the Idempotency-Key, and hash what it came with.

    Each owner has keys of its own. chosen: the UUID of a PUT, which takes its place. transparent: see decode_inputs.
    None for a request without either. Raises InvalidField.
    """
    if chosen is not None and (header := request.headers.get("idempotency-key")) is not None:
        raise InvalidField.of("Idempotency-Key", "absent with PUT, where the id does what it would do", header)
    name = key_in_headers(request) if chosen is None else chosen
    if name is None:
        return None
    # Defaults are left out, so that the hash outlives a version that knows more parameters.
    given = asked.model_dump(exclude_defaults=True)
    given = {name: sha256(value).hexdigest() if isinstance(value, bytes) else value for name, value in given.items()}
    if webhook is not None:
        given["webhook"] = webhook.to_json()
    if transparent:  # the same mask then makes another image
        given["transparent"] = True
    what = sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return Key(name, what, owner, is_chosen=chosen is not None)
