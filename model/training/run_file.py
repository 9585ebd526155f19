"""The file from which a run goes on: tensors in safetensors, and in its head all else, as JSON. Nothing is pickled.

Earlier versions wrote a file of torch.save. It is read as plain tensors, and goes when the run is saved again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tminus.model.files import write_atomically

STATE_FILE = "training-state.safetensors"
FORMER_FILE = "training-state.pt"
PARTS = ("net", "ema", "remembered")


def begun_in(folder: Path) -> bool:
    """Whether a run was saved here."""
    return (folder / STATE_FILE).is_file() or (folder / FORMER_FILE).is_file()


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state of PARTS and `optimizer`, as state dicts, and what JSON can hold; whole or not at all."""
    moments = state["optimizer"]["state"]
    tensors: dict[str, Tensor] = {
        **{f"{part}.{key}": value for part in PARTS for key, value in state[part].items()},
        **{f"optimizer.{index}.{key}": value for index in moments for key, value in moments[index].items()},
    }
    rest = {key: value for key, value in state.items() if key not in (*PARTS, "optimizer")}
    rest["param_groups"] = state["optimizer"]["param_groups"]
    # The optimiser's kernel goes through weights and moments in the order of memory, which must be the same again.
    rest["channels_last"] = [key for key, value in tensors.items() if not value.is_contiguous()]
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    head = {"format": "pt", "state": json.dumps(rest)}
    write_atomically(folder / STATE_FILE, lambda path: save_file(tensors, path, metadata=head))
    (folder / FORMER_FILE).unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what was written, on the CPU. Raises whatever a damaged file makes its reader raise."""
    file = folder / STATE_FILE
    if not file.is_file():
        former: dict[str, Any] = torch.load(folder / FORMER_FILE, map_location="cpu", weights_only=True)
        return former
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*PARTS, "optimizer")}
    with safe_open(file, framework="pt") as opened:
        state: dict[str, Any] = json.loads(opened.metadata()["state"])
        channels_last = set(state.pop("channels_last"))
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            part, _, key = name.partition(".")
            value = opened.get_tensor(name)
            parts[part][key] = value.to(memory_format=torch.channels_last) if name in channels_last else value
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    optimizer = {"state": moments, "param_groups": state.pop("param_groups")}
    return {**state, **parts, "optimizer": optimizer}
