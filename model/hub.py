"""Download checkpoints from the Hugging Face Hub by id: `owner/name` or `owner/name@revision`.

huggingface_hub, an optional dependency, downloads files into its own cache. This module selects the files, checks that
the checkpoint is complete, and falls back to the cached commit if the Hub is unreachable.
"""

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tminus.model.files import AUTOENCODERS, WEIGHTS_NAME, CheckpointError, first_line, read_json

log = logging.getLogger(__name__)

PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"  # the owner or the name, with the characters that huggingface_hub allows
HUB_ID = re.compile(rf"({PART}/{PART})(?:@([A-Za-z0-9_][A-Za-z0-9._/-]{{0,199}}))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PARTS = ("", "unet/", *(f"{part}/" for part in AUTOENCODERS))  # folders that hold a config.json and weights
JSON_FILES = (
    *("model_index.json", "tminus.json", "scheduler_config.json", "scheduler/scheduler_config.json", "samplers/*.json"),
    *(f"{part}{name}" for part in PARTS for name in ("config.json", f"{WEIGHTS_NAME}*.index*.json")),
)
# Weight files to download. Each set is tried in turn until the checkpoint is complete: plain weights, then variants
# such as .fp16, then .bin.
WEIGHTS = (
    (f"{WEIGHTS_NAME}.safetensors", f"{WEIGHTS_NAME}-*-of-*.safetensors"),
    (f"{WEIGHTS_NAME}*.safetensors",),
    (f"{WEIGHTS_NAME}*.bin",),
)


@dataclass(frozen=True, slots=True)
class HubId:
    """The id of a checkpoint on the Hub."""

    repository: str  # owner/name
    revision: str | None  # a branch, tag or commit; None means the default branch

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """Parse an id. Returns None if the text is not an id."""
        found = HUB_ID.fullmatch(text)
        return cls(found[1], found[2]) if found is not None and ".." not in text and "--" not in text else None

    @property
    def name(self) -> str:
        """The default model name."""
        return self.repository.partition("/")[2]

    @property
    def commit(self) -> str | None:
        """The revision if it is a full commit hash, otherwise None. The files of a commit never change."""
        return self.revision if self.revision is not None and COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def path_or_id(name: str | Path) -> Path | HubId:
    """Return `name` as a Hub id if it looks like one, otherwise as a path.

    A name whose path or parent folder exists is always a path.
    """
    path = Path(name)
    hub_id = HubId.parse(str(name))
    return path if hub_id is None or path.exists() or path.parent.exists() else hub_id


def checkpoint_folder(name: str | Path | HubId) -> Path:
    """Return the local folder of a path or Hub id, downloading missing files.

    Raises CheckpointError if the checkpoint cannot be downloaded.
    """
    found = name if isinstance(name, HubId) else path_or_id(name)
    return _fetched(found) if isinstance(found, HubId) else found


def hub_name(folder: Path) -> str | None:
    """Return the model name of a folder in the Hub's cache, or None for any other folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.rpartition("--")[2]


def _fetched(hub_id: HubId) -> Path:
    """Download the JSON files and the weights unless they are cached. Returns the folder in the cache."""
    hub = _client(hub_id)
    if hub_id.commit is not None and (folder := _cached(hub_id)) is not None:
        log.info("%s is in the cache: %s", hub_id, folder)
        return folder
    try:
        # snapshot_download waits forever if the Hub does not answer, so make a request with a timeout first.
        hub.HfApi().model_info(hub_id.repository, revision=hub_id.revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        for weights in WEIGHTS:
            patterns = [*JSON_FILES, *(f"{part}{name}" for part in PARTS for name in weights)]
            folder = Path(hub.snapshot_download(hub_id.repository, revision=hub_id.revision, allow_patterns=patterns))
            if is_whole(folder):
                log.info("%s is commit %s, in %s", hub_id, folder.name, folder)
                return folder
    except Exception as error:
        why = _why_unreachable(hub_id, error)
        if (cached := _cached(hub_id)) is None:
            raise CheckpointError(f"{hub_id}: no such folder, not in the hub's cache, and {why}") from error
        log.warning("%s: %s; commit %s of the cache is taken", hub_id, why, cached.name)
        return cached
    raise CheckpointError(
        f"{hub_id}: holds no {WEIGHTS_NAME}.safetensors or .bin with its config.json, as a checkpoint of diffusers does"
    )


def _cached(hub_id: HubId) -> Path | None:
    """Return the cached folder of a revision, or None if it is missing or incomplete. Stays offline."""
    hub = _client(hub_id)
    try:
        folder = hub.snapshot_download(
            hub_id.repository, revision=hub_id.revision, allow_patterns=JSON_FILES, local_files_only=True
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    return Path(folder) if is_whole(Path(folder)) else None


def is_whole(folder: Path) -> bool:
    """Return True if a cached folder has all files of a checkpoint.

    Files may be missing after an interrupted download. Those that exist are complete, because huggingface_hub moves a
    file to its final path only when the download has finished.
    """
    try:
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    except CheckpointError:
        return False
    is_flat = not (folder / "unet").is_dir()
    scheduler = folder / ("" if is_flat else "scheduler") / "scheduler_config.json"
    parts = [""] if is_flat else ["unet", *(part for part in AUTOENCODERS if part in index)]
    return ("scheduler" not in index or scheduler.is_file()) and all(_part_is_whole(folder / part) for part in parts)


def _part_is_whole(folder: Path) -> bool:
    weights = [file for suffix in ("safetensors", "bin") for file in folder.glob(f"{WEIGHTS_NAME}*.{suffix}")]
    shards = {int(found[1]) for file in weights if (found := re.search(r"-of-(\d+)\.", file.name))}
    return (folder / "config.json").is_file() and bool(weights) and all(len(weights) >= count for count in shards)


def _client(hub_id: HubId) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("httpx", "httpx2"):  # these libraries log every request
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{hub_id}: no such folder; to fetch it from the Hugging Face hub takes an extra: "
            "pip install '.[hub]' in a checkout"
        ) from None
    return huggingface_hub


def _why_unreachable(hub_id: HubId, error: Exception) -> str:
    """Describe why the Hub is unreachable.

    Raises CheckpointError if the Hub refused the request or if the cache cannot be written.
    """
    errors = _client(hub_id).errors
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the failed request
    endpoint = _client(hub_id).constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    refusal = None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        cache = _client(hub_id).constants.HF_HUB_CACHE
        refusal = f"{cache} cannot be written: {error.strerror}; HF_HOME names another place"
    elif isinstance(error, errors.GatedRepoError) or status == 403:
        refusal = (
            f"the hub gives it only to users who have access: ask for it at {endpoint}/{hub_id.repository}, and give "
            "your token by HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        refusal = f"the model is there, but has no revision {hub_id.revision or 'main'!r}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        refusal = f"no such folder, and no such model at {endpoint}; for a private one give your token by HF_TOKEN"
    elif status is not None and status < 500 and status != 429:
        refusal = f"{endpoint} answers {status}"
    if refusal is not None:
        raise CheckpointError(f"{hub_id}: {refusal}") from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, (errors.FileMetadataError, ValueError, KeyError, TypeError, AttributeError)):
        return f"{endpoint} does not answer as a hub does: {first_line(error)}"
    return f"{endpoint} cannot be reached: {first_line(error)}"
