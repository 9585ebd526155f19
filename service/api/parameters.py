"""Read a request's parameters: query and JSON body, merged. Types and bounds are the schema's business."""

import json
import math
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

from service.errors import BodyTooLarge, ConflictingField, MalformedBody, short

PICTURES = ("image", "mask")  # what may be megabytes of base64, or a file in a form
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
LIST_FIELDS = frozenset({"class_label", "guidance_interval", "show"})


def from_query(items: Iterable[tuple[str, str]], where: str = "the query") -> dict[str, Any]:
    """Turn query items into parameters; lists repeat their name. Raises ConflictingField for others that do.

    The fields of a form are the same thing at another place.
    """
    values: dict[str, list[str]] = {}
    for name, value in items:
        values.setdefault(name, []).append(value)
    parameters: dict[str, Any] = {}
    for name, given in values.items():
        if len(given) > 1 and name not in LIST_FIELDS:
            if len(set(given)) > 1:
                raise ConflictingField(f"{name} is given {len(given)} times in {where}", field=name, value=given)
            given = given[:1]
        parameters[name] = given if len(given) > 1 else given[0]
    return parameters


def structure_bytes(body: bytes) -> int:
    """How many bytes are no letters of base64: brackets, commas, quotes. They are what JSON takes time to parse for."""
    return len(body.translate(None, BASE64))


def from_body(body: bytes, max_bytes: float = math.inf) -> dict[str, Any]:
    """Parse a JSON object; an empty body has no parameters.

    max_bytes is for all but the pictures in it. Raises MalformedBody, BodyTooLarge, or ConflictingField for a repeat.
    """
    if (dear := structure_bytes(body)) > max_bytes:
        raise BodyTooLarge(dear, int(max_bytes))
    value = _parse(body)
    pictures = [value[name] for name in PICTURES if isinstance(value.get(name), str)]
    if (rest := len(body) - sum(map(len, pictures))) > max_bytes:
        raise BodyTooLarge(rest, int(max_bytes))
    return value


def _parse(body: bytes) -> dict[str, Any]:
    if not body.strip():
        return {}
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise MalformedBody(f"the body must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise MalformedBody(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def merge(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Join the two. Raises ConflictingField where both give a field and differ."""
    for name in query.keys() & body.keys():
        if not _same(query[name], body[name]):
            detail = f"{name} is {short(query[name])!r} in the query and {short(body[name])!r} in the body"
            raise ConflictingField(detail, field=name, value=query[name])
    return query | body


def _same(query_value: Any, body_value: Any) -> bool:
    if isinstance(query_value, list) or isinstance(body_value, list):
        both = [v if isinstance(v, list) else [v] for v in (query_value, body_value)]
        return len(both[0]) == len(both[1]) and all(map(_same_scalar, *both))
    return _same_scalar(query_value, body_value)


def _same_scalar(query_value: str, body_value: Any) -> bool:
    if isinstance(body_value, (list, dict)):
        return False
    text = body_value if isinstance(body_value, str) else json.dumps(body_value)
    if query_value == text:
        return True
    try:  # 2 and 2.0 are one guidance
        return Decimal(query_value) == Decimal(text)
    except InvalidOperation:
        return False


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ConflictingField(f"{short(name)!r} is in the body twice", field=name, value=value)
        members[name] = value
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
