"""Packs a job's arrays into bytes, as safetensors. Reading safetensors runs no code."""

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

SNAPSHOT_FORMAT = 2  # increase if the state of a plan or a row changes; format 1 had no registers and no number
# Errors that may be raised when damaged bytes are unpacked.
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
    """Raise StorageFailed if the block cannot decode its data. A database does not detect damaged bytes."""
    try:
        yield
    except UNREADABLE as error:
        log.error("%s cannot be read: %r", what, error)
        raise StorageFailed(f"{what} cannot be read", damaged=True) from None


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """Pack a snapshot without compression, because its floats are mostly noise."""
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
    """Unpack a snapshot. Raises one of the errors in UNREADABLE if it is damaged or of another format."""
    arrays = safetensors.numpy.load(data)
    made_as = int(arrays["format"][0]) if "format" in arrays else 1
    if made_as != SNAPSHOT_FORMAT:
        raise ValueError(f"a snapshot of format {made_as}, and this version reads format {SNAPSHOT_FORMAT}")
    return Snapshot(tuple(map(int, arrays["steps"])), arrays["x"], arrays["x0_previous"], arrays["registers"])


def pack_inputs(inputs: Inputs) -> bytes:
    """Pack the image of an edit, and the mask if there is one."""
    return zlib.compress(_pack({"image": inputs.image} | ({"mask": inputs.mask} if inputs.mask is not None else {})), 1)


def unpack_inputs(data: bytes) -> Inputs:
    """Unpack the inputs of an edit. Raises one of the errors in UNREADABLE."""
    arrays = safetensors.numpy.load(zlib.decompress(data))
    return Inputs(arrays["image"], arrays.get("mask"))


def pack_images(images: Pixels) -> bytes:
    """Pack the images of a job."""
    return zlib.compress(_pack({"images": images}), level=1)


def unpack_images(data: bytes) -> Pixels:
    """Unpack the images of a job. Raises one of the errors in UNREADABLE."""
    return safetensors.numpy.load(zlib.decompress(data))["images"]


def _pack(arrays: dict[str, npt.NDArray[np.generic]]) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in arrays.items()})
