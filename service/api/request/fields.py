"""The types of request fields, and the base class that checks their names and types. Pydantic errors end here."""

import binascii
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, WithJsonSchema

from tminus.service.errors import InvalidField, InvalidImage, UnknownField

MAX_SEED = 2**64 - 1
SEED_BOUND = f"an integer in 0..{MAX_SEED}"
SEED_BITS = 53  # a drawn seed survives JavaScript's numbers
MAX_EXACT = 2**53
EVERY_BOUND = "an integer of at least 1"
ENCODED_IMAGE = "base64 of an image, or a data: URL with it"
DIGITS = re.compile(r"[0-9]+")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_ITEMS = 2  # of a list, but for one that has an item for each image

# One spelling for each value, in text as in JSON: Python's int and float, and pydantic's bool, know many more.


def _whole(value: object) -> int:
    """To JSON Schema, and so to OpenAPI, 5.0 is an integer; above 2^53 a float may not be the number that was sent."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    raise ValueError("not an integer")


def _integer(value: object) -> int:
    return int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else _whole(value)


def _number(value: object) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    if type(value) in (int, float):
        return value  # type: ignore[return-value]
    raise ValueError("not a number")


def _boolean(value: object) -> bool:
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    raise ValueError("neither true nor false")


def _image_bytes(value: object, info: ValidationInfo) -> bytes:
    """Decode base64, or a data: URL with it (RFC 2397); bytes, from a form's file, stay as they are."""
    if isinstance(value, bytes):
        return value
    field = info.field_name or ""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a text")
    encoded = value
    if value[:5].lower() == "data:":
        head, _, encoded = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage.of(field, ENCODED_IMAGE, f"a data: URL without base64: {head}")
    try:
        return binascii.a2b_base64("".join(encoded.split()), strict_mode=True)
    except ValueError as error:  # binascii.Error, or the complaint about a letter that is not ASCII
        raise InvalidImage.of(field, ENCODED_IMAGE, f"{value[:40]!r} ({error})") from None


Whole = Annotated[int, BeforeValidator(_whole)]  # no text: where a text is something else
Int = Annotated[int, BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = Annotated[bool, BeforeValidator(_boolean)]
Picture = Annotated[bytes, BeforeValidator(_image_bytes), WithJsonSchema({"type": "string", "format": "byte"})]


class RequestSchema(BaseModel):
    """The parameters of one kind of request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def own_of(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Take the parameters of this schema out of those of a request."""
        return {name: parameters.pop(name) for name in cls.model_fields if name in parameters}

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], bound_of: Callable[[str], str], max_items: int = MAX_ITEMS
    ) -> Self:
        """Check names and types, and the bounds that the fields declare; bound_of says a field's bound in words.

        A list of more than max_items is refused before its items are looked at: pydantic would build an error for each.
        Raises UnknownField, InvalidImage, or InvalidField for the first wrong field.
        """
        known = cls.model_fields
        for name, value in parameters.items():
            if name not in known:
                raise UnknownField.of(name, known, value)
            if isinstance(value, list) and len(value) > max_items:
                detail = f"{name} must be {bound_of(name)}, got a list of {len(value)}"
                raise InvalidField(detail, field=name, value=value, bound=bound_of(name))
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = str(first["loc"][0])
            raise InvalidField.of(field, bound_of(field), parameters.get(field)) from None
