"""Checkpoints of the Hugging Face hub by their ids: `owner/name`, or `owner/name@revision`.

They lie in huggingface_hub's own cache, which it fills. What is here decides which files a checkpoint has, whether they
are all there already, and when a hub that is slow, gone or wrong is given up. huggingface_hub is an extra.
"""

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tminus.model.files import WEIGHTS_NAME, CheckpointError, first_line, read_json

log = logging.getLogger(__name__)

PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"  # of an id, as huggingface_hub has it
HUB_ID = re.compile(rf"({PART}/{PART})(?:@([A-Za-z0-9_][A-Za-z0-9._/-]{{0,199}}))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
GIB = 2**30
DEFAULT_REVISION = "main"
SNAPSHOTS, OWNED = "snapshots", "models--"  # in the cache: models--OWNER--NAME/snapshots/COMMIT
FOLDERS = ("", "unet/", "scheduler/", "vqvae/", "vae/", "samplers/")  # where a checkpoint has files
WEIGHTS = re.compile(rf"{WEIGHTS_NAME}[\w.-]*\.(safetensors|bin)")
MOST_FILES, MOST_JSON_BYTES = 512, 64 * 2**20
ANSWER_S = 10.0  # for the hub to say what there is
PATIENCE_S = 30.0  # in which some bytes have to come
LEAST_BYTES_PER_S = 8192
LOOK_S, TELL_S = 0.1, 5.0  # how often the bytes that came are counted, and told


class _HubFile(Protocol):
    """A file as the hub lists it."""

    rfilename: str
    size: int | None


@dataclass(frozen=True, slots=True)
class HubId:
    """An id as it was given."""

    repository: str  # owner/name
    revision: str | None  # a branch, a tag or a commit; None for the newest

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """Read an id; None for what is none."""
        found = HUB_ID.fullmatch(text)
        return cls(found[1], found[2]) if found is not None and ".." not in text and "--" not in text else None

    @property
    def name(self) -> str:
        """What a model is called that has no other name."""
        return self.repository.partition("/")[2]

    @property
    def commit(self) -> str | None:
        """The commit, where the revision is one: then nothing about it can change."""
        return self.revision if self.revision is not None and COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def path_or_id(given: str | Path) -> Path | HubId:
    """Tell which of the two names a checkpoint. A path wins: what exists, or lies in a folder that exists, is no id."""
    path = Path(given)
    hub_id = HubId.parse(str(given))
    return path if hub_id is None or path.exists() or path.parent.exists() else hub_id


def checkpoint_folder(given: str | Path | HubId) -> Path:
    """Return the folder of a checkpoint that is given by its path or by its hub id; fetches what is not there.

    Raises CheckpointError.
    """
    found = given if isinstance(given, HubId) else path_or_id(given)
    return _fetched(found) if isinstance(found, HubId) else found


def hub_name(folder: Path) -> str | None:
    """Return the name of the model that a folder of the hub's cache holds; None for other folders."""
    repository = folder.parent.parent.name
    if folder.parent.name != SNAPSHOTS or not repository.startswith(OWNED):
        return None
    return repository.rpartition("--")[2]


def _fetched(hub_id: HubId) -> Path:
    """Return the folder in the cache, after what was missing has been fetched."""
    _client(hub_id)  # raises where it is not installed
    if hub_id.commit is not None and (folder := _cached(hub_id)) is not None:
        log.info("%s is in the cache: %s", hub_id, folder)
        return folder
    commit: str
    files: dict[str, int]
    try:
        commit, files = _bounded(lambda: _listed(hub_id), hub_id)
    except _Unreachable as error:
        if (folder := _cached(hub_id)) is None:
            raise CheckpointError(f"{hub_id}: no such folder, not in the hub's cache, and {error.why}") from None
        log.warning("%s: %s; commit %s of the cache is taken", hub_id, error.why, folder.name)
        return folder
    wanted = wanted_files(files)
    if not wanted:
        raise CheckpointError(
            f"{hub_id}: holds no {WEIGHTS_NAME}.safetensors or .bin with its config.json, as a checkpoint of diffusers "
            "does"
        )
    folder = _repository_folder(hub_id) / SNAPSHOTS / commit
    missing = {name: size for name, size in wanted.items() if not (folder / name).exists()}
    if missing:
        _check_space(hub_id, sum(missing.values()))
        log.info("%s: fetching %d files, %s, of commit %s", hub_id, len(missing), _mb(sum(missing.values())), commit)
        _download(hub_id, commit, missing)
    _note_newest(hub_id, commit)
    log.info("%s is commit %s, in %s", hub_id, commit, folder)
    return folder


# --- which files ---


def wanted_files(files: Mapping[str, int]) -> dict[str, int]:
    """Choose the files of a checkpoint, with their sizes: JSON, safetensors, and .bin where there are no safetensors.

    Nothing else of a repository is read, so that nothing else is fetched: no other pickles, and no code.
    """
    chosen: dict[str, int] = {}
    for folder in FOLDERS:
        inside = {name.removeprefix(folder): name for name in files if _lies_in(name, folder)}
        chosen |= {name: files[name] for short, name in inside.items() if short.endswith(".json")}
        weights = [short for short in inside if WEIGHTS.fullmatch(short)]
        tensors = [short for short in weights if short.endswith(".safetensors")] or weights
        # A variant, as .fp16 is, is read only where there are no plain weights.
        plain = [short for short in tensors if re.fullmatch(rf"{WEIGHTS_NAME}(-\d+-of-\d+)?\.\w+", short)] or tensors
        chosen |= {inside[short]: files[inside[short]] for short in plain}
    has_weights = any(WEIGHTS.search(name) for name in chosen if not name.endswith(".json"))
    return chosen if has_weights else {}


def _lies_in(name: str, folder: str) -> bool:
    return name.startswith(folder) and "/" not in name.removeprefix(folder)


def is_whole(folder: Path) -> bool:
    """Whether all parts of a checkpoint are in a folder of the cache, where a fetch may have ended half way.

    What is there is complete, file by file: huggingface_hub puts a file in place when it has come to its end.
    """
    try:
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    except CheckpointError:
        return False
    if not (folder / "unet").is_dir():  # all lies beside the index, or there is none
        has_scheduler = "scheduler" not in index or (folder / "scheduler_config.json").is_file()
        return has_scheduler and _part_is_whole(folder)
    parts = [name for name, value in index.items() if isinstance(value, list) and f"{name}/" in FOLDERS]
    return all(_part_is_whole(folder / part) for part in ("unet", *parts))


def _part_is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    if folder.name == "scheduler":
        return "scheduler_config.json" in names
    weights = {name for name in names if WEIGHTS.fullmatch(name)}
    shards = {int(found[1]) for name in weights if (found := re.search(r"-of-(\d+)\.", name))}
    return "config.json" in names and bool(weights) and all(len(weights) >= most for most in shards)


# --- what the cache has ---


def _cached(hub_id: HubId) -> Path | None:
    """Return the folder of a revision in the cache, without a call of the hub; None where it is not all there.

    huggingface_hub itself takes it for whole only with all files of the repository, also those that nobody reads.
    """
    try:
        commit = hub_id.commit or _newest(hub_id).read_text()
    except OSError:
        return None
    folder = _repository_folder(hub_id) / SNAPSHOTS / commit
    return folder if is_whole(folder) else None


def _newest(hub_id: HubId) -> Path:
    """Return the file in which the cache has the commit that a branch or tag was."""
    return _repository_folder(hub_id) / "refs" / (hub_id.revision or DEFAULT_REVISION)


def _note_newest(hub_id: HubId, commit: str) -> None:
    """Note in the cache which commit a branch or tag was, for a later start that cannot ask."""
    if hub_id.commit is not None:
        return
    file = _newest(hub_id)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text() != commit:
            file.write_text(commit)
    except OSError as error:
        log.warning("%s: %s cannot be written: %s", hub_id, file, error.strerror)


def _repository_folder(hub_id: HubId) -> Path:
    cache = Path(_client(hub_id).constants.HF_HUB_CACHE)
    return cache / f"{OWNED}{hub_id.repository.replace('/', '--')}"


def _check_space(hub_id: HubId, need_bytes: int) -> None:
    place = _repository_folder(hub_id)
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if need_bytes > free_bytes:
        raise CheckpointError(
            f"{hub_id}: takes {need_bytes / GIB:.2f} GiB, and {free_bytes / GIB:.2f} GiB are free in {place}; HF_HOME "
            "names another place"
        )


# --- the hub ---


class _Unreachable(CheckpointError):
    """The hub cannot be asked."""

    def __init__(self, hub_id: HubId, why: str) -> None:
        super().__init__(f"{hub_id}: {why}")
        self.why = why


def _client(hub_id: HubId) -> Any:
    """Import huggingface_hub. Raises CheckpointError where it is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the log has lines of ours
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("httpx", "httpx2"):  # a line for each request
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


def _listed(hub_id: HubId) -> tuple[str, dict[str, int]]:
    """Ask the hub which commit a revision is, and for its files with their sizes."""
    hub = _client(hub_id)
    info = hub.HfApi().model_info(hub_id.repository, revision=hub_id.revision, files_metadata=True, timeout=ANSWER_S)
    siblings: Iterable[_HubFile] = info.siblings or ()
    files = {each.rfilename: each.size or 0 for each in siblings}
    if not COMMIT.fullmatch(str(info.sha)) or not all(_is_plain(name) for name in files):
        raise ValueError("what it lists is not what a hub lists")
    return info.sha, files


def _is_plain(name: object) -> bool:
    """Whether a file's name stays below the folder that it is put in."""
    return isinstance(name, str) and "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _download(hub_id: HubId, commit: str, files: Mapping[str, int]) -> None:
    """Have huggingface_hub fetch files one after the other; what came of them stays for the next time."""
    hub, blobs = _client(hub_id), _repository_folder(hub_id) / "blobs"
    large = [name for name, size in files.items() if name.endswith(".json") and size > MOST_JSON_BYTES]
    if len(files) > MOST_FILES or large:
        what = f"{len(files)} files" if not large else f"{large[0]} of {_mb(files[large[0]])}"
        raise CheckpointError(f"{hub_id}: {what}, more than a checkpoint has")

    def act() -> None:
        for name in files:
            hub.hf_hub_download(hub_id.repository, name, revision=commit, etag_timeout=ANSWER_S)

    before_bytes, total_bytes = _bytes_in(blobs), sum(files.values())
    _bounded(act, hub_id, lambda: _bytes_in(blobs) - before_bytes, total_bytes)


def _bytes_in(folder: Path) -> int:
    """Count the bytes of files, those that are being written too."""
    total = 0
    try:
        for entry in os.scandir(folder):
            total += entry.stat().st_size
    except OSError:  # not made yet, or a file that was renamed meanwhile
        pass
    return total


def _bounded(act: Callable[[], Any], hub_id: HubId, came: Callable[[], int] = lambda: 0, total_bytes: int = 0) -> Any:
    """Do something with the hub in a thread, which is given up when too little comes; returns what it returns.

    A library's own bounds are for the time between two bytes: a hub that sends one now and then would hold a start for
    ever. came: counts the bytes that came. Raises CheckpointError, and _Unreachable where the hub cannot be asked.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tminus-hub", daemon=True)
    thread.start()
    since_s = told_s = time.monotonic()
    since_bytes = 0
    while thread.is_alive():
        thread.join(LOOK_S)
        now_s, now_bytes = time.monotonic(), came()
        if now_bytes > total_bytes + MOST_JSON_BYTES:
            raise CheckpointError(f"{hub_id}: the hub sends more than the {_mb(total_bytes)} that it said")
        if thread.is_alive() and now_s - since_s > PATIENCE_S:
            if now_bytes - since_bytes < LEAST_BYTES_PER_S * PATIENCE_S:
                came_text = f"{_mb(now_bytes - since_bytes)} came" if total_bytes else "no answer came"
                raise _Unreachable(hub_id, f"the hub is too slow: in {PATIENCE_S:g} s {came_text}")
            since_s, since_bytes = now_s, now_bytes
        if total_bytes and thread.is_alive() and now_s - told_s > TELL_S:
            told_s = now_s
            log.info("%s: %s of %s", hub_id, _mb(now_bytes), _mb(total_bytes))
    if errors:
        _raise_clearly(hub_id, errors[0])
    return results[0]


def _raise_clearly(hub_id: HubId, error: BaseException) -> None:
    """Say in a line what is wrong, for one of the many errors of huggingface_hub and of what it is made of."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # what stood in the way of the hub
    endpoint = _client(hub_id).constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, CheckpointError):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        place = _repository_folder(hub_id)
        raise CheckpointError(f"{hub_id}: {place} cannot be written: {error.strerror}; HF_HOME names another place")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        raise CheckpointError(
            f"{hub_id}: the hub gives it only to users who have access: ask for it at {endpoint}/"
            f"{hub_id.repository}, and give your token by HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        revision = hub_id.revision or DEFAULT_REVISION
        raise CheckpointError(f"{hub_id}: the model is there, but has no revision {revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        raise CheckpointError(
            f"{hub_id}: no such folder, and no such model at {endpoint}; for a private one give your token by HF_TOKEN"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise _Unreachable(hub_id, "HF_HUB_OFFLINE is set")
    if status is not None and status < 500 and status != 429:
        raise CheckpointError(f"{hub_id}: {endpoint} answers {status}")
    if isinstance(error, (errors.FileMetadataError, ValueError, KeyError, TypeError, AttributeError)):
        raise _Unreachable(hub_id, f"{endpoint} does not answer as a hub does: {first_line(error)}")
    raise _Unreachable(hub_id, f"{endpoint} cannot be reached: {first_line(error)}")


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
