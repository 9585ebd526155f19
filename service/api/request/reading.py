"""Reads requests: headers, and parameters from the query and from a JSON body or a form.

The schemas then check names, types and bounds.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, ParamSpec, TypeVar
from urllib.request import parse_http_list

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect, HTTPConnection

from tminus.service.api.edge.middleware import body_of
from tminus.service.api.request.multipart import FORM, Form, parse_form
from tminus.service.api.request.schemas import NUMBER, PICTURES, Bounds, RequestSchema
from tminus.service.errors import (
    BodyTooLarge,
    ConflictingField,
    InvalidField,
    JobCancelled,
    MalformedBody,
    MalformedRequest,
    NotAcceptable,
    UnknownField,
    UnsupportedEncoding,
    UnsupportedMediaType,
    ValidationErrors,
    short,
)
from tminus.service.images.encoder import JSON
from tminus.service.jobs.webhooks.webhook import origin_of
from tminus.service.model_info import Limits

Parsed = TypeVar("Parsed")
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=RequestSchema)
P = ParamSpec("P")
KEY = re.compile(r"[\x20-\x7e]{1,255}")  # a valid Idempotency-Key
MAX_MARKS = 4096  # maximum number of MARKS in a body; requests have about forty, plus any in class names
# Characters that start a list, an object or a member. Parsing is slow if there are many, because Python's garbage
# collector keeps visiting the objects that the parser has created.
MARKS = b"[{:"
SMALL_BYTES = 64 * 1024  # larger bodies are parsed in a thread; this size takes at most 2 ms in the event loop
LIST_FIELDS = frozenset({"class_label", "guidance_interval", "keep", "show", "webhook_events_filter"})
# JSON parsers are fast on these bytes. Other bytes, such as brackets and quotes, are expensive to parse.
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


def negotiate(request: Request, offered: Sequence[str], hint: str = "") -> str:
    """Return the offered media type with the highest quality in Accept, or the first of several equals.

    The quality of an offered type is that of the most specific range that matches it. An empty header accepts
    everything. Raises NotAcceptable if no type matches. hint: text to add after the types in that error.
    """
    accept = ", ".join(request.headers.getlist("accept"))  # repeated headers form one list
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

    best = max(offered, key=quality)  # max returns the first of several equals
    if quality(best) <= 0:
        bound = f"one of {', '.join(offered)}{hint}"
        raise NotAcceptable(
            f"Accept must allow {bound}, got {accept[:200]!r}", field="Accept", value=accept, bound=bound
        )
    return best


def qualities(header: str) -> list[tuple[str, float]]:
    """Return the names in a header such as Accept or Accept-Encoding, in lower case, each with its quality in 0..1."""
    return [_quality(part) for part in header.split(",") if part.strip()]


def _quality(part: str) -> tuple[str, float]:
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


def cache_directives(request: Request) -> frozenset[str]:
    """Return a request's cache directives, such as no-cache, in lower case (RFC 9111, section 5.2.1).

    Pragma counts only if there is no Cache-Control (section 5.4).
    """
    headers = request.headers
    directives = parse_http_list(", ".join(headers.getlist("cache-control") or headers.getlist("pragma")))
    return frozenset(directive.partition("=")[0].strip().lower() for directive in directives)


def has_answer(request: Request, etag: str) -> bool:
    """Return True if If-None-Match says that the client already has this response (RFC 9110, section 13.1.2).

    Weak and strong ETags compare as equal. `*` matches any response to GET or HEAD, but none to POST, because a
    response to POST is not a resource.
    """
    names = [name.strip().removeprefix("W/") for name in ",".join(request.headers.getlist("if-none-match")).split(",")]
    return etag in names or ("*" in names and request.method in ("GET", "HEAD"))


def check_encoding(request: Request) -> None:
    """Raise UnsupportedEncoding for a compressed body."""
    for encoding in ",".join(request.headers.getlist("content-encoding")).split(","):
        if encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding(encoding.strip())


def key_in_headers(request: Request) -> str | None:
    """Return the Idempotency-Key, or None without the header. The quotes of a structured-field string are removed.

    Raises InvalidField for an invalid key. Raises MalformedRequest for two headers: only headers that are lists may be
    repeated (RFC 9110, section 5.3).
    """
    if not (headers := request.headers.getlist("idempotency-key")):
        return None
    if len(headers) > 1:
        detail = f"the request has {len(headers)} headers Idempotency-Key"
        raise MalformedRequest(detail, field="Idempotency-Key", value=headers, bound="at most one")
    (header,) = headers
    name = header.strip().removeprefix('"').removesuffix('"').strip()
    if not KEY.fullmatch(name):
        raise InvalidField.of("Idempotency-Key", "1 to 255 printable ASCII characters", header)
    return name


def media_type_of(request: Request) -> str:
    """Return the media type of the body in lower case, or "" without a Content-Type."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_form(request: Request) -> bool:
    """Return True if the body is a multipart form."""
    return media_type_of(request) == FORM


async def read_parameters(request: Request, limits: Limits) -> tuple[dict[str, Any], ValidationErrors]:
    """Read the parameters in the query and the body. Return the valid parameters, and the errors of the rest.

    Raises UnsupportedEncoding, UnsupportedMediaType, or the errors of `read_form` and `read_json`.
    """
    check_encoding(request)
    query, errors = from_query(request)
    for name in PICTURES:
        if name in query:
            bound = f"in the body, base64 in JSON or a file of a form (curl -F {name}=@file), not in the query"
            errors.add(InvalidField.of(name, bound, query.pop(name)))
    if "webhook" in query:  # its URL may contain secrets, and logs and browser histories keep queries
        errors.add(InvalidField.of("webhook", "in the body, not in the query", origin_of(str(query.pop("webhook")))))
    if is_form(request):
        form = await read_form(request, limits.max_image_bytes, PICTURES)
        body = {**from_items(form.fields, "the form", errors), **form.files}
    else:
        body = await read_json(request, limits.max_body_bytes, (JSON, FORM))
    return merge(query, body, errors), errors


async def parse_call(
    kind: type[Kind],
    values: dict[str, Any],
    bounds: Bounds,
    errors: ValidationErrors | None = None,
    context: object = None,
) -> Kind:
    """Check the parameters of a call as RequestSchema.parse does. Much base64 is decoded in a thread."""
    size_bytes = sum(len(values[name]) for name in PICTURES if isinstance(values.get(name), str))
    return await off_loop(size_bytes, kind.parse, values, bounds, errors, context)


def from_query(request: HTTPConnection) -> tuple[dict[str, Any], ValidationErrors]:
    """Read the parameters in the query. Return the valid parameters, and the errors of the rest."""
    errors = ValidationErrors()
    return from_items(request.query_params.multi_items(), "the query", errors), errors


def in_query(kind: type[Kind]) -> Any:
    """Return a dependency that reads a call's parameters from the query."""

    async def parse(request: Request) -> Kind:  # async: FastAPI would run a plain function in a thread
        values, errors = from_query(request)
        return kind.parse(values, errors=errors)

    return Depends(parse)


async def no_parameters(request: HTTPConnection) -> None:
    """Raise UnknownField if the query of a call without parameters is not empty."""
    errors = ValidationErrors()
    for name, value in request.query_params.multi_items():
        detail = f"there is no parameter {short(name)!r}; known: none"
        errors.add(UnknownField(detail, field=name, value=value, bound="absent: this call has no parameters"))
    errors.check()


BARE = [Depends(no_parameters)]  # for calls without parameters


async def off_loop(size_bytes: int, parse: Callable[P, Parsed], *args: P.args, **kwargs: P.kwargs) -> Parsed:
    """Run a parser, in a thread if it parses more than SMALL_BYTES, so that the event loop stays free."""
    if size_bytes <= SMALL_BYTES:
        return parse(*args, **kwargs)
    return await asyncio.to_thread(parse, *args, **kwargs)


async def chunks_of(request: Request) -> AsyncIterator[bytes]:
    """Yield the chunks of a body. Raises JobCancelled if the client disconnects."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise JobCancelled("the client disconnected") from None


async def read_form(request: Request, max_bytes: int, files: Collection[str]) -> Form:
    """Read a form. files: names of the fields that may be images. Raises JobCancelled or the errors of `parse_form`."""
    body, held = await read_body(request), body_of(request.scope)
    with held.budget.hold(SMALL_BYTES, held.owner) as copies:
        copies.add(len(body))  # parsing copies the parts
        return await off_loop(len(body), parse_form, body, request.headers["content-type"], max_bytes, files)


async def read_body(request: Request) -> bytes:
    """Read a body. Raises JobCancelled if the client disconnects.

    Unlike `request.body()`, this does not keep the bytes until the request ends.
    """
    return b"".join([chunk async for chunk in chunks_of(request)])


async def read_json(request: Request, max_bytes: int, taken: Collection[str] | None = (JSON,)) -> dict[str, Any]:
    """Read a JSON body. max_bytes: limit on the body without its pictures. Reading stops once the limit is exceeded.

    taken: the media types that the call accepts, for the error message. Only JSON is read here: a body without a type
    counts as JSON, and any other type is refused. None: read a body of any type as JSON, for APIs whose clients do not
    declare JSON.

    Raises UnsupportedMediaType or the errors of `from_body`.
    """
    body, costly_bytes, declared = bytearray(), 0, media_type_of(request)
    async for chunk in chunks_of(request):
        if chunk and taken is not None and declared not in ("", JSON):  # an empty body may have any type
            raise UnsupportedMediaType.of(request.headers["content-type"], taken)
        body += chunk
        costly_bytes += len(chunk.translate(None, BASE64))
        if costly_bytes > max_bytes:
            raise BodyTooLarge(costly_bytes, max_bytes)
    return await off_loop(len(body), from_body, bytes(body), max_bytes)


def from_items(items: Iterable[tuple[str, str]], where: str, errors: ValidationErrors) -> dict[str, Any]:
    """Convert the items of a query or a form to parameters. Only list fields may be repeated.

    If another field is repeated, it is left out and a ConflictingField is added to `errors`.
    """
    values: dict[str, list[str]] = {}
    for name, value in items:
        values.setdefault(name, []).append(value)
    parameters: dict[str, Any] = {}
    for name, given in values.items():
        if len(given) > 1 and name not in LIST_FIELDS:
            detail = f"{short(name)} is given {len(given)} times in {where}"
            errors.add(ConflictingField(detail, field=name, value=given))
            continue
        parameters[name] = given if len(given) > 1 else given[0]
    return parameters


def from_body(body: bytes, max_bytes: int) -> dict[str, Any]:
    """Parse a JSON object. An empty body means no parameters.

    max_bytes: limit on the body without its pictures. Raises MalformedBody, BodyTooLarge, or ConflictingField if a name
    occurs twice.
    """
    costly = body.translate(None, BASE64)
    if len(costly) > max_bytes:
        raise BodyTooLarge(len(costly), max_bytes)
    if sum(costly.count(mark) for mark in MARKS) > MAX_MARKS:
        raise MalformedBody(f"the body must be a JSON object with at most {MAX_MARKS} lists, objects and members in it")
    if not body.strip():
        return {}
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise MalformedBody(f"the body must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise MalformedBody(f"the body must be a JSON object, got {type(value).__name__}")
    pictures = [value[name] for name in PICTURES if isinstance(value.get(name), str)]
    if (rest_bytes := len(body) - sum(map(len, pictures))) > max_bytes:
        raise BodyTooLarge(rest_bytes, max_bytes)
    return value


def merge(query: dict[str, Any], body: dict[str, Any], errors: ValidationErrors) -> dict[str, Any]:
    """Merge query and body. If they disagree about a field, it is left out and a ConflictingField is added."""
    merged = query | body
    for name in query:
        if name in body and not _same(query[name], body[name]):
            detail = f"{short(name)} is {short(query[name])!r} in the query and {short(body[name])!r} in the body"
            errors.add(ConflictingField(detail, field=name, value=query[name]))
            del merged[name]
    return merged


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
    if not (NUMBER.fullmatch(query_value) and NUMBER.fullmatch(text)):
        return False
    try:
        return Decimal(query_value) == Decimal(text)  # 2 and 2.0 are equal
    except InvalidOperation:  # the exponent may have twenty digits, for example
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


async def while_connected(request: Request, wanted: Awaitable[Result]) -> Result:
    """Wait for `wanted`. If the client disconnects first, cancel `wanted` and raise JobCancelled.

    While waiting, receive and discard the rest of the body. This may also raise errors, such as SlowBody.
    """
    wait = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        either: set[asyncio.Future[Any]] = {wait, gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not wait.done():
            gone.result()
            raise JobCancelled("the client disconnected")
        return wait.result()
    finally:
        gone.cancel()
        wait.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
