"""An image inside JSON: base64, or a data: URL of it (RFC 2397). Pure."""

import binascii

from service.errors import InvalidImage

WANTED = "base64 of an image, or a data: URL with it"


def image_bytes(value: object, field: str) -> bytes:
    """The bytes of an image as JSON has it; bytes, of a form's file, are as they are.

    Raises InvalidImage for a text that is neither, ValueError for what is no text.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a text")
    encoded = value
    if value[:5].lower() == "data:":
        head, _, encoded = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage.of(field, WANTED, f"a data: URL without base64: {head}")
    try:
        return binascii.a2b_base64("".join(encoded.split()), strict_mode=True)
    except ValueError as error:  # binascii.Error is one, and so is what says that it is not ASCII
        raise InvalidImage.of(field, WANTED, f"{value[:40]!r} ({error})") from None
