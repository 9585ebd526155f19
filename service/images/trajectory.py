"""Writes and reads trajectories as safetensors files. docs/reinforcement.md describes the contents."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from tminus.model.trajectory import Trajectory, transitions
from tminus.service.model_info import ModelInfo
from tminus.service.spec import Pixels, SampleSpec

TRAJECTORY: Final = "application/vnd.tminus.trajectory"
FORMAT = 2  # incremented when the contents of the file change
# Another version of safetensors may write other bytes. Another version of NumPy may round mean, s and log p
# differently.
TRAJECTORY_VERSION = f"format {FORMAT}; safetensors {safetensors.__version__}; numpy {np.__version__}"
METADATA_KEY = "tminus"  # the only key, because safetensors writes several keys in no fixed order
MAX_METADATA_BYTES = 2**20
LENGTH_BYTES = 8  # size of the file's first field, which holds the length of the header
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TrajectoryFile:
    """The contents of a file: the arrays of `arrays_of`, and a document that says how they were made."""

    document: Mapping[str, Any]
    arrays: Arrays


def pack_trajectory(
    trajectory: Trajectory, images: Pixels, spec: SampleSpec, model: ModelInfo, recipe: Mapping[str, object]
) -> bytes:
    """Return the bytes of a trajectory file. images: the finished images, uint8 [n, H, W, C]. recipe: as in PNGs."""
    made_by = {"device": model.device, "executor": model.executor, "precision": model.precision, "exact": model.exact}
    passes = trajectory.selected.passes
    keep = {} if len(passes) == len(trajectory.plan.lines) else {"keep": passes}
    document = {"format": FORMAT, **recipe, **keep, "made_by": made_by}
    arrays = {name: np.ascontiguousarray(each) for name, each in arrays_of(trajectory, images, spec, model).items()}
    return safetensors.numpy.save(arrays, {METADATA_KEY: json.dumps(document)})


def arrays_of(trajectory: Trajectory, images: Pixels, spec: SampleSpec, model: ModelInfo) -> Arrays:
    """Return the arrays of a trajectory file by name."""
    plan, selected, drawn = trajectory.plan, trajectory.selected, transitions(trajectory)
    arrays: dict[str, npt.NDArray[Any]] = {
        "x_t": trajectory.x_t,
        "x_0": trajectory.x_0,
        "x_t_at": np.array(selected.points),
        "x_0_at": np.array(selected.predictions),
        "passes": drawn.passes,
        "mean": drawn.mean,
        "s": drawn.s,
        "log_p": drawn.log_p,
        "timesteps": plan.timesteps,
        "lines": plan.lines,
        "inputs": plan.inputs,
        "images": images,
    }
    if plan.matrices is not None:
        arrays["matrices"] = plan.matrices
    if spec.class_labels is not None:
        labels = [model.null_class if label is None else label for label in spec.class_labels]
        arrays["class_labels"] = np.array([-1 if label is None else label for label in labels])
    return arrays


def read_trajectory(data: bytes) -> TrajectoryFile:
    """Parse a trajectory file. Raises ValueError if the data is damaged, truncated, or in another format."""
    try:
        arrays = safetensors.numpy.load(data)  # checks the header against the data; executes no code
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"not a trajectory, or truncated or damaged ({error})") from None
    header_bytes = int.from_bytes(data[:LENGTH_BYTES], "little")
    if header_bytes > MAX_METADATA_BYTES:
        raise ValueError(f"its header takes {header_bytes} bytes, over {MAX_METADATA_BYTES}")
    try:
        text = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + header_bytes])["__metadata__"][METADATA_KEY]
        document = json.loads(text)
        made_as = document["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"no {METADATA_KEY!r} in its metadata: not made by tminus, or stripped since") from None
    if type(made_as) is not int or made_as != FORMAT:
        raise ValueError(f"of format {made_as!r:.20}, and this version of tminus reads {FORMAT}")
    return TrajectoryFile(document, arrays)
