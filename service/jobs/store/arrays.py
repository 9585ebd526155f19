"""Packs arrays for a job store, in the safetensors format. Unlike pickle, safetensors runs no code when read."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from tminus.service.errors import StorageFailed
from tminus.service.spec import Inputs, Pixels, Snapshot

log = logging.getLogger(__name__)

SNAPSHOT_FORMAT = 2  # increase it when a job's passes or the saved state change; format 1 had no registers, no number
# Errors that unpacking damaged bytes may raise.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    zlib.error,
    safetensors.SafetensorError,
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn decoding errors of the `with` block into StorageFailed. A database does not detect flipped bits."""
    try:
        yield
    except UNREADABLE as error:
        log.error("%s cannot be read: %r", what, error)
        raise StorageFailed(f"{what} cannot be read", damaged=True) from None


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """Pack a snapshot, without compression because its floats are mostly noise."""
    return _pack(
        {
            "format": np.array([SNAPSHOT_FORMAT]),
            "steps": np.array(snapshot.steps),
            "x": snapshot.x,
            "x0_previous": snapshot.x0_previous,
            "registers": snapshot.registers,
        }
    )


def unpack_snapshot(data: bytes) -> Snapshot:
    """Unpack a snapshot. Raises one of the UNREADABLE errors, even for a valid snapshot in another format."""
    arrays = safetensors.numpy.load(data)
    made_as = int(arrays["format"][0]) if "format" in arrays else 1
    if made_as != SNAPSHOT_FORMAT:
        raise ValueError(f"a snapshot of format {made_as}, and this version reads format {SNAPSHOT_FORMAT}")
    return Snapshot(tuple(map(int, arrays["steps"])), arrays["x"], arrays["x0_previous"], arrays["registers"])


def pack_inputs(inputs: Inputs) -> bytes:
    """Pack the image of an edit, and its mask if there is one."""
    return zlib.compress(_pack({"image": inputs.image} | ({"mask": inputs.mask} if inputs.mask is not None else {})), 1)


def unpack_inputs(data: bytes) -> Inputs:
    """Unpack the inputs of an edit. Raises one of the UNREADABLE errors."""
    arrays = safetensors.numpy.load(zlib.decompress(data))
    return Inputs(arrays["image"], arrays.get("mask"))


def pack_images(images: Pixels) -> bytes:
    """Pack the images of a job."""
    return zlib.compress(_pack({"images": images}), level=1)


def unpack_images(data: bytes) -> Pixels:
    """Unpack the images of a job. Raises one of the UNREADABLE errors."""
    return safetensors.numpy.load(zlib.decompress(data))["images"]


def _pack(arrays: dict[str, npt.NDArray[np.generic]]) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in arrays.items()})
