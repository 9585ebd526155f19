"""Signatures as Standard Webhooks has them (standardwebhooks.com, version 1, symmetric): HMAC-SHA256 with a time."""

import base64
import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
MOST_SECRETS = 8
MOST_FILE_BYTES = 4096
FORM = f"{PREFIX} and base64 of {LEAST_BYTES} to {MOST_BYTES} bytes"


def read_secrets(text: str) -> tuple[bytes, ...]:
    """Read one secret a line, the newest first; each signs. Raises ValueError, without the secret."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not 1 <= len(lines) <= MOST_SECRETS:
        raise ValueError(f"there must be 1 to {MOST_SECRETS} secrets, one a line; there are {len(lines)}")
    return tuple(map(_secret, lines))


def read_secrets_of(file: Path) -> tuple[bytes, ...]:
    """As `read_secrets`, from a file. Raises ValueError."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise ValueError(f"{file} has more than {MOST_FILE_BYTES} bytes")
        return read_secrets(data.decode("ascii"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} has other characters than those of a secret, {FORM}") from None


def _secret(line: str) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(PREFIX), validate=True)
    except ValueError:
        secret = b""
    if not line.startswith(PREFIX) or not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise ValueError(f"a secret must be {FORM}, as `echo {PREFIX}$(openssl rand -base64 32)` makes one")
    return secret


def signed_headers(secrets: Iterable[bytes], delivery_id: str, unix_s: int, body: bytes) -> dict[str, str]:
    """The headers by which a receiver knows who sent a body, and when."""
    content = f"{delivery_id}.{unix_s}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode() for secret in secrets)
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(unix_s),
        "webhook-signature": " ".join(f"v1,{each}" for each in signatures),
    }
