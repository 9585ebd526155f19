"""The types of request fields, and the base class that checks their names and types. Pydantic errors end here."""

import binascii
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, WithJsonSchema

from service.errors import InvalidField, InvalidImage, UnknownField, short

MAX_SEED = 2**64 - 1
SEED_BOUND = f"an integer in 0..{MAX_SEED}"
SEED_BITS = 53  # a drawn seed survives JavaScript's numbers
EVERY_BOUND = "an integer of at least 1"
ENCODED_IMAGE = "base64 of an image, or a data: URL with it"


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


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


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Picture = Annotated[bytes, BeforeValidator(_image_bytes), WithJsonSchema({"type": "string", "format": "byte"})]


class RequestSchema(BaseModel):
    """The parameters of one kind of request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def divide(cls, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide parameters into those of this schema and the rest."""
        own = {name: value for name, value in parameters.items() if name in cls.model_fields}
        return own, {name: value for name, value in parameters.items() if name not in own}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], bound_of: Callable[[str], str]) -> Self:
        """Check names and types, and the bounds that the fields declare; bound_of says a field's bound in words.

        Raises UnknownField, InvalidImage, or InvalidField for the first wrong field.
        """
        for name in parameters:
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                detail = f"there is no parameter {short(name)!r}; known: {known}"
                raise UnknownField(detail, field=name, value=parameters[name], bound=f"one of {known}")
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
            raise InvalidField.of(field, bound_of(field), parameters.get(field)) from None
