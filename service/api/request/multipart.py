"""Parse a form that brings images: files and text fields.

Forms are parsed in memory, where the body is bounded already, on top of python-multipart's tokenizer. Ready parsers do
not fit: starlette's writes files over 1 MiB to /tmp (small in a container), accepts a form that breaks off, does not
say which field is too long, and decodes fields by any codec the client names, of which some raise. python-multipart's
FormParser bounds no field of a multipart form and undoes base64. The package `multipart` shares its module's name with
an alias that python-multipart installs.
"""

from collections.abc import AsyncIterable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tminus.service.errors import (
    BodyTooLarge,
    ConflictingField,
    InvalidImage,
    MalformedForm,
    UnknownField,
    short,
)

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM, BYTES = "multipart/form-data", "application/octet-stream"
MAX_PARTS = 128  # a class for each of 64 images, and all other parameters
MAX_FIELD_BYTES = 1024
FORM_BYTES = 64 * 1024  # for what a form has besides its images: boundaries, the parts' headers, the fields


@dataclass(frozen=True, slots=True)
class Form:
    """A form: its files by name, and its text fields in order."""

    files: Mapping[str, bytes]
    fields: tuple[tuple[str, str], ...]


async def parse_form(chunks: AsyncIterable[bytes], content_type: str, max_bytes: int, files: Collection[str]) -> Form:
    """Parse a form that may have an image, of at most max_bytes, in each of these files.

    Raises BodyTooLarge, MalformedForm, UnknownField, ConflictingField, InvalidImage.
    """
    form = _to_form(await _read_parts(chunks, content_type), files)
    for name, data in form.files.items():
        if len(data) > max_bytes:
            raise BodyTooLarge(len(data), max_bytes, name)
    return form


@dataclass(slots=True)
class _Part:
    """One part of a form. A part with a file name is a file, as browsers and curl send them."""

    disposition: bytes = b""
    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


class _Parts:
    """Collects the parts that python-multipart reports. Raises MalformedForm for too many, or for too long a field."""

    def __init__(self) -> None:
        self.all: list[_Part] = []
        self.ended = False
        self._header, self._value = bytearray(), bytearray()

    def on_part_begin(self) -> None:
        if len(self.all) == MAX_PARTS:
            raise MalformedForm(f"the form must have at most {MAX_PARTS} parts")
        self.all.append(_Part())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self.all[-1].disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self.all[-1].disposition)
        if b"name" not in options:
            raise MalformedForm("each part of the form must have a name")
        self.all[-1].name = options[b"name"].decode("utf-8", "replace")
        self.all[-1].is_file = b"filename" in options

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.all[-1]
        part.data += data[start:end]
        if not part.is_file and len(part.data) > MAX_FIELD_BYTES:
            raise MalformedForm(f"a field of the form must have at most {MAX_FIELD_BYTES} bytes: {short(part.name)!r}")

    def on_end(self) -> None:
        self.ended = True


async def _read_parts(chunks: AsyncIterable[bytes], content_type: str) -> list[_Part]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedForm("the form's Content-Type must name its boundary")
    parts = _Parts()
    callbacks: MultipartCallbacks = {
        "on_part_begin": parts.on_part_begin,
        "on_header_field": parts.on_header_field,
        "on_header_value": parts.on_header_value,
        "on_header_end": parts.on_header_end,
        "on_headers_finished": parts.on_headers_finished,
        "on_part_data": parts.on_part_data,
        "on_end": parts.on_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise MalformedForm(f"the form cannot be read: {short(str(error))}") from None
    if not parts.ended:
        raise MalformedForm("the form ends before its last boundary")
    return parts.all


def _to_form(parts: list[_Part], known: Collection[str]) -> Form:
    """Sort the parts into files and fields. Raises UnknownField, InvalidImage, ConflictingField."""
    files: dict[str, list[bytes]] = {}
    fields: list[tuple[str, str]] = []
    for part in parts:
        if not part.is_file:
            fields.append((part.name, part.data.decode("utf-8", "replace")))
        elif part.name in known:
            files.setdefault(part.name, []).append(bytes(part.data))
        else:
            names = ", ".join(known)
            detail = f"there is no file {short(part.name)!r} to send; known: {names}"
            raise UnknownField(detail, field=part.name, value=f"{len(part.data)} bytes", bound=names)
    for name, text in fields:
        if name in known:
            raise InvalidImage.of(name, f"a file: curl -F {name}=@file", f"the text {short(text)!r}")
    for name, given in files.items():
        if len(given) > 1:
            detail = f"{name} is in the form {len(given)} times"
            raise ConflictingField(detail, field=name, value=f"{len(given)} files")
    return Form({name: data for name, (data,) in files.items()}, tuple(fields))
