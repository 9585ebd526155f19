"""Which files a checkpoint folder has to hold, before any of them is read in earnest."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from tminus.model.files import CheckpointError, read_json
from tminus.model.latent.config import KL, VQ
from tminus.model.latent.folder import find_autoencoder
from tminus.model.weights import WEIGHTS_NAME

INDEX_FILE = "model_index.json"
LATENT_PIPELINE = "LDMPipeline"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline", LATENT_PIPELINE)
LAYOUTS = (
    "What is served is a folder of diffusers: with unet/ and scheduler/, or flat with config.json, "
    f"scheduler_config.json and {WEIGHTS_NAME}.safetensors"
)


def check_layout(folder: Path) -> str | None:
    """Say what a path holds that cannot be loaded; returns the scheduler's class, where model_index.json names one."""
    if folder.is_file():
        other = "; tminus convert makes one of a file of some other projects"
        raise CheckpointError(f"{folder}: a file ({folder.suffix or 'no suffix'}). {LAYOUTS}{other}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        raise CheckpointError(f"{folder}: the folder is empty")
    index = check_pipeline(folder)
    class_name = read_json(folder / "config.json").get("_class_name") if "config.json" in names else None
    if "Transformer" in str(class_name):
        raise CheckpointError(
            f"{folder}: config.json: {class_name!r:.100} is a transformer, and U-Nets are what is run here"
        )
    if class_name in (VQ, KL):
        raise CheckpointError(
            f"{folder}: an autoencoder, which makes no images by itself; tminus train --latent trains a network on its "
            "latents"
        )
    if not (folder / "unet").is_dir() and "config.json" not in names:
        raise CheckpointError(f"{folder}: holds {shorten(', '.join(names), 200)}. {LAYOUTS}")
    if not find_scheduler(folder).is_file():
        raise CheckpointError(
            f"{folder}: a U-Net without a scheduler_config.json, which says how its noise was made. {LAYOUTS}; tminus "
            "convert writes one by flags"
        )
    entry = index.get("scheduler")
    if entry is None:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(f"{folder}: {INDEX_FILE}: scheduler must be [library, class], got {entry!r:.100}")
    return str(entry[1])


def check_pipeline(folder: Path) -> dict[str, Any]:
    """Read a folder's model_index.json, empty where there is none. Raises CheckpointError for other pipelines."""
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    pipeline = index.get("_class_name", PIPELINES[0])
    if pipeline not in PIPELINES:
        kinds = ", ".join(PIPELINES)
        why = _why_not(index)
        raise CheckpointError(f"{folder}: {INDEX_FILE}: {pipeline!r:.100} is not served{why}; those that are: {kinds}")
    if pipeline == LATENT_PIPELINE and find_autoencoder(folder) is None:
        raise CheckpointError(f"{folder}: {INDEX_FILE}: an {pipeline} without its autoencoder, the folder vqvae/")
    return index


def _why_not(index: Mapping[str, Any]) -> str:
    """Why a pipeline with these parts cannot be served, where that can be said."""
    if any(str(part).startswith(("text_encoder", "tokenizer", "prior")) for part in index):
        return ": it makes images of text, and a class is all that is taken here"
    if "transformer" in index:
        return ": its denoiser is a transformer, and U-Nets are what is run here"
    return ""


def find_scheduler(folder: Path) -> Path:
    """Where a folder's scheduler_config.json is, or would be."""
    nested = folder / "scheduler" / "scheduler_config.json"
    return nested if nested.is_file() else folder / "scheduler_config.json"
