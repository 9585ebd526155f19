"""Requests of KServe's protocol, as a client makes them, in JSON and with bytes behind it."""

import json
from typing import Any

import numpy as np

SPEC = {"steps": 4, "seed": 7}


def tensor(name: str, datatype: str, *data: object, shape: object = None, **more: object) -> dict[str, Any]:
    """A tensor with its values in JSON."""
    return {
        "name": name,
        "datatype": datatype,
        "shape": [len(data)] if shape is None else shape,
        "data": list(data),
    } | more


def plain(*more: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors of SPEC, and others."""
    return [tensor("steps", "INT32", 4), tensor("seed", "UINT64", 7), *more]


def as_bytes(name: str, datatype: str, data: bytes, shape: object, size: object = None) -> tuple[dict[str, Any], bytes]:
    """A tensor whose values are behind the JSON. size: what it says, if not the truth."""
    parameters = {"binary_data_size": len(data) if size is None else size}
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}, data


def texts(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def body(
    tensors: list[tuple[dict[str, Any], bytes]], header: object = None, behind: bytes = b"", **members: object
) -> tuple[bytes, dict[str, str]]:
    """A body with bytes behind its JSON, and its header. header: what that says, if not the truth."""
    head = json.dumps({"inputs": [described for described, _ in tensors], **members}).encode()
    said = len(head) if header is None else header
    return head + b"".join(data for _, data in tensors) + behind, {"Inference-Header-Content-Length": str(said)}


def numbers(datatype: str, *values: object) -> bytes:
    return np.array(
        values, {"INT64": "<i8", "UINT64": "<u8", "INT32": "<i4", "FP32": "<f4", "FP64": "<f8"}[datatype]
    ).tobytes()
