"""Checks of types and sizes in a server's responses. Every check is pure and raises ValueError."""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

T = TypeVar("T")

MOST = 2**64 - 1  # the largest seed; all counts are smaller
LONGEST_S = 1e12
MAX_VALUES = 2**20  # values in a JSON document; a value of two bytes can need 50 bytes of memory
MAX_TOKEN = 200
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SIGNATURES = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/webp": b"RIFF",
    "application/zip": b"PK\x03\x04",
    "application/json": b"{",
    "application/x-npy": b"\x93NUMPY",
    "application/vnd.tminus.trajectory": b"{",
}
SIGNATURE_AT = {"application/vnd.tminus.trajectory": 8}  # bytes; safetensors begins with the length of its header


def loads(data: bytes | str) -> Any:
    """Parse JSON. Refuses a document with more than about MAX_VALUES values."""
    comma, bracket, brace = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    if data.count(comma) + data.count(bracket) + data.count(brace) > MAX_VALUES:  # type: ignore[arg-type]
        raise ValueError(f"JSON of more than {MAX_VALUES} values")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _of(kind: type[T], otherwise: str) -> Callable[[object], T]:
    def check(value: object) -> T:
        if not isinstance(value, kind):
            raise ValueError(f"{otherwise}: {value!r:.40}")
        return value

    return check


mapping: Callable[[object], dict[str, Any]] = _of(dict, "no object")
items: Callable[[object], list[Any]] = _of(list, "no array")
text = _of(str, "no text")
yes_or_no = _of(bool, "neither true nor false")


def token(value: object) -> str:
    """Check for a string of 1 to MAX_TOKEN printable ASCII characters, which is safe in a header or a URL."""
    found = text(value)
    if not (found.isascii() and found.isprintable() and 0 < len(found) <= MAX_TOKEN):
        raise ValueError(f"no token: {found!r:.40}")
    return found


def model_name(value: object) -> str:
    """Check for a valid model name, which is safe in a URL."""
    found = text(value)
    if not MODEL_NAME.fullmatch(found):
        raise ValueError(f"model must be 1..64 of A-Z a-z 0-9 . _ -, a letter or digit first, got {found!r:.100}")
    return found


def one_of(known: Sequence[T], value: object) -> T:
    """Check that a value is in a list, and return the equal value from the list."""
    if value not in known:
        raise ValueError(f"none of {', '.join(map(str, known))}: {value!r:.40}")
    return known[known.index(value)]


def whole(value: object) -> int:
    """Check for an integer from 0 to MOST."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError(f"no whole number: {value!r:.40}")
    return value


def number(value: object) -> float:
    """Check for a number from 0 to LONGEST_S."""
    if type(value) not in (int, float) or not 0 <= value <= LONGEST_S:  # type: ignore[operator]
        raise ValueError(f"no number: {value!r:.40}")
    return value  # type: ignore[return-value]


def read(kind: type[T], value: object) -> T:
    """Convert a JSON object to a dataclass.

    Each member is checked by the type of its field, or by the `check` in the field's metadata. A field with a default
    is optional. Unknown members are ignored, because a newer server may add some. Raises KeyError for a missing member.
    """
    document, found = mapping(value), {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name in document or (each.default is MISSING and each.init):
            types = get_args(each.type) if isinstance(each.type, UnionType) else (each.type,)
            check = each.metadata.get("check") or CHECKS.get(types[0]) or partial(one_of, get_args(types[0]))
            member = document[each.name]
            found[each.name] = None if member is None and NoneType in types else check(member)
    return kind(**found)


def optional(check: Callable[[object], T], value: object) -> T | None:
    """Apply a check to a value, unless the value is None."""
    return None if value is None else check(value)


def picture(value: bytes, media_type: str) -> bytes:
    """Check that a file starts with the signature of its media type."""
    if not value.startswith(SIGNATURES[media_type], SIGNATURE_AT.get(media_type, 0)):
        raise ValueError(f"no {media_type}: {value[:16]!r}")
    return value


def decoded(value: object) -> bytes:
    """Decode base64."""
    try:
        return base64.b64decode(text(value), validate=True)
    except binascii.Error:
        raise ValueError(f"no base64: {value!r:.40}") from None


CHECKS: dict[Any, Callable[[object], Any]] = {
    int: whole,
    float: number,
    str: token,
    bool: yes_or_no,
    Mapping[str, Any]: mapping,
}
