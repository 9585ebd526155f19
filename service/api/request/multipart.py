"""Parse a form with images: its files and text fields.

The body has a size limit, and `bytes.find` splits it at its boundaries, so no body can make Python loop over bytes.
Existing parsers do not fit. starlette uses python-multipart's parser, which takes 0.3 s for each MB of data that is
nearly a boundary, because it loops over such data byte by byte. starlette also writes files over 1 MiB to /tmp (small
in a container), accepts a truncated form, does not name a field that is too long, and decodes fields with any codec
that the client names, even codecs that raise. The package `multipart` has the module name of an alias that
python-multipart installs.
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
MAX_PARTS = 128  # a class for each of 64 images, and all other parameters
MAX_FIELD_BYTES = 1024
MAX_HEAD_BYTES = 4096  # headers of a part
MAX_BOUNDARY_BYTES = 70  # RFC 2046, section 5.1.1
FORM_BYTES = 64 * 1024  # bytes for a form's boundaries, part headers and fields, besides its images
Part = tuple[str, bool, bytes]  # name, True if the part is a file (has a file name), data
PIECE_BYTES = 2**18  # bytes of one search, which holds the GIL for at most 2 ms


@dataclass(frozen=True, slots=True)
class Form:
    """A form: its files by name, and its text fields in order."""

    files: Mapping[str, bytes]
    fields: tuple[tuple[str, str], ...]


def parse_form(body: bytes, content_type: str, max_bytes: int, files: Collection[str]) -> Form:
    """Parse a form. files: names of fields that may be images. max_bytes: limit of each image.

    Raises BodyTooLarge, MalformedForm, UnknownField, ConflictingField, InvalidImage.
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
    is_first = body.startswith(delimiter[2:])  # the first delimiter may have no line break before it
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
    """Parse a part: the rest of the delimiter's line, headers, an empty line, data. Raises MalformedForm."""
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
    """Sort the parts into files and fields. Raises UnknownField, InvalidImage, ConflictingField."""
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
