"""Parses multipart forms: image files and text fields.

The body's size is limited, and `bytes.find` splits it, so no body can make Python loop over single bytes.

Other parsers do not fit. python-multipart, which starlette uses, loops byte by byte over data that resembles a
boundary, and so takes 0.3 s per MB of such data. starlette also writes files over 1 MiB to /tmp, which is small in a
container. It accepts truncated forms, does not say which field is too long, and decodes fields with any codec that the
client names, including codecs that raise. The package `multipart` cannot be used either, because python-multipart
installs an alias with the same module name.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

from tminus.service.errors import (
    BodyTooLarge,
    ConflictingField,
    InvalidImage,
    MalformedForm,
    UnknownField,
    short,
)

FORM, BYTES = "multipart/form-data", "application/octet-stream"
MAX_PARTS = 128  # enough for 64 images with a class each, and all other parameters
MAX_FIELD_BYTES = 1024
MAX_HEAD_BYTES = 4096  # limit on the headers of a part
MAX_BOUNDARY_BYTES = 70  # RFC 2046, section 5.1.1
FORM_BYTES = 64 * 1024  # allowed for boundaries, part headers and text fields together
Part = tuple[str, bool, bytes]  # (name, True for a file, data); a file is a part with a file name
PIECE_BYTES = 2**18  # bytes searched at once, which holds the GIL for at most 2 ms


@dataclass(frozen=True, slots=True)
class Form:
    """A parsed form: files keyed by name, and text fields in their original order."""

    files: Mapping[str, bytes]
    fields: tuple[tuple[str, str], ...]


def parse_form(body: bytes, content_type: str, max_bytes: int, files: Collection[str]) -> Form:
    """Parse a form. files: the names of the fields that may be images. max_bytes: size limit of each image.

    Raises BodyTooLarge, MalformedForm, UnknownField, ConflictingField or InvalidImage.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
        bound = f"1 to {MAX_BOUNDARY_BYTES} characters"
        raise MalformedForm(f"the form's Content-Type must name its boundary, of {bound}, got {len(boundary)}")
    form = _to_form(list(_parts(body, b"\r\n--" + boundary)), files)
    for name, data in form.files.items():
        if len(data) > max_bytes:
            raise BodyTooLarge(len(data), max_bytes, name)
    return form


def _parts(body: bytes, delimiter: bytes) -> Iterator[Part]:
    """Split a body at its delimiters. Raises MalformedForm.

    A delimiter is a line that begins with the boundary (RFC 2046, section 5.1.1).
    """
    is_first = body.startswith(delimiter[2:])  # a line break before the first delimiter is optional
    at = (0 if is_first else _find(body, delimiter, 0) + 2) + len(delimiter) - 2
    for _ in range(MAX_PARTS + 1):
        if body.startswith(b"--", at):
            return
        end = _find(body, delimiter, at)
        yield _part(body, at, end)
        at = end + len(delimiter)
    raise MalformedForm(f"the form must have at most {MAX_PARTS} parts")


def _find(body: bytes, delimiter: bytes, start: int) -> int:
    for at in range(start, len(body), PIECE_BYTES):
        if (found := body.find(delimiter, at, at + PIECE_BYTES + len(delimiter) - 1)) >= 0:
            return found
    raise MalformedForm("the form ends before its last boundary")


def _part(body: bytes, start: int, end: int) -> Part:
    """Parse a part: the rest of the delimiter line, headers, an empty line and data. Raises MalformedForm."""
    head, empty_line, _ = body[start : min(end, start + MAX_HEAD_BYTES)].partition(b"\r\n\r\n")
    rest, *headers = head.split(b"\r\n")
    if not empty_line or rest.strip(b" \t"):
        bound = f"headers and an empty line, in at most {MAX_HEAD_BYTES} bytes"
        raise MalformedForm(f"each part of the form must begin with {bound}, got {short(repr(head))}")
    fields = {name.lower(): value.strip() for name, _, value in (header.partition(b":") for header in headers)}
    _, options = parse_options_header(fields.get(b"content-disposition"))
    if b"name" not in options:
        raise MalformedForm("each part of the form must have a name")
    name, is_file = options[b"name"].decode("utf-8", "replace"), b"filename" in options
    data = body[start + len(head) + len(empty_line) : end]
    if not is_file and len(data) > MAX_FIELD_BYTES:
        raise MalformedForm(f"a field of the form must have at most {MAX_FIELD_BYTES} bytes: {short(name)!r}")
    return name, is_file, data


def _to_form(parts: list[Part], known: Collection[str]) -> Form:
    """Sort the parts into files and fields. Raises UnknownField, InvalidImage or ConflictingField."""
    files: dict[str, list[bytes]] = {}
    fields: list[tuple[str, str]] = []
    for name, is_file, data in parts:
        if not is_file:
            fields.append((name, data.decode("utf-8", "replace")))
        elif name in known:
            files.setdefault(name, []).append(data)
        else:
            names = ", ".join(known)
            detail = f"there is no file {short(name)!r} to send; known: {names}"
            raise UnknownField(detail, field=name, value=f"{len(data)} bytes", bound=names)
    for name, text in fields:
        if name in known:
            raise InvalidImage.of(name, f"a file: curl -F {name}=@file", f"the text {short(text)!r}")
    for name, given in files.items():
        if len(given) > 1:
            detail = f"{name} is in the form {len(given)} times"
            raise ConflictingField(detail, field=name, value=f"{len(given)} files")
    return Form({name: data for name, (data,) in files.items()}, tuple(fields))
