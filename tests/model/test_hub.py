"""Checkpoints by their hub id, with the real huggingface_hub against a hub of the tests' own on the loopback."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hub import Hub, Repository, commit_of, running_hub
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.hub import HubId, checkpoint_folder, hub_name, is_whole
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D

ID = "google/ddpm-cifar10-32"
WEIGHTS = "diffusion_pytorch_model"
# A process of its own, since huggingface_hub reads its variables when it is imported. 0.5 s without torch.
PROGRAM = """
import logging, sys
from pathlib import Path
import tminus.model.hub as hub
logging.basicConfig(level=logging.INFO, format="%(message)s")

for given in sys.argv[1:]:
    try:
        print(hub.checkpoint_folder(given))
    except hub.CheckpointError as error:
        print(f"refused: {error}")
"""


@dataclass
class Fetched:
    line: str  # the folder, or the refusal
    log: str

    @property
    def folder(self) -> Path:
        assert not self.line.startswith("refused: "), self.line
        return Path(self.line)

    @property
    def refusal(self) -> str:
        """The one line that says why not."""
        assert self.line.startswith("refused: "), self.line
        assert "Traceback" not in self.log
        return self.line.removeprefix("refused: ")


# What diffusers has huggingface_hub fetch: what it reads of a repository, and not the rest.
ANOTHER_PROGRAM = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], allow_patterns=["*.json", "*.safetensors"]))
"""

FetchAll = Callable[..., list[Fetched]]
Fetch = Callable[..., Fetched]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def fetch_all(hub: Hub, tmp_path: Path) -> FetchAll:
    """Ask for checkpoints in a process of its own, whose cache is the test's."""
    (tmp_path / "here").mkdir()

    def run(*given: str, program: str = PROGRAM, **variables: str) -> list[Fetched]:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        arguments = [sys.executable, "-c", program, *given]
        environment = inherited | own | {"PYTHONPATH": os.getcwd()} | variables
        done = subprocess.run(
            arguments, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        lines = done.stdout.splitlines()
        assert len(lines) == len(given), done.stdout
        return [Fetched(line, done.stderr) for line in lines]

    return run


@pytest.fixture
def fetch(fetch_all: FetchAll) -> Fetch:
    """Ask for one checkpoint."""
    return lambda given, **options: fetch_all(given, **options)[0]


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it."""
    folder = tmp_path_factory.mktemp("nested") / "pipeline"
    net = UNet2D(TINY)
    randomize(net)
    save_checkpoint(folder, net.state_dict(), TINY, NoiseConfig(), Labels(), {})
    (folder / "tminus.json").unlink()
    return folder


@pytest.fixture(scope="module")
def flat(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As google/ddpm-cifar10-32 is, with what else lies in such a repository."""
    folder = tmp_path_factory.mktemp("flat") / "repository"
    shutil.copytree(nested / "unet", folder)
    shutil.copy(nested / "scheduler" / "scheduler_config.json", folder)
    index = (nested / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index)
    (folder / "README.md").write_text("# DDPM")
    (folder / "train.py").write_text("raise SystemExit")
    (folder / "optimizer.pkl").write_bytes(pickle.dumps({}))
    state = load_file(folder / f"{WEIGHTS}.safetensors")
    torch.save(state, folder / f"{WEIGHTS}.bin")
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_flat_repository_is_fetched_once_and_only_what_is_read(hub: Hub, fetch: Fetch, flat: Path) -> None:
    commit = hub.push(ID, flat)
    found = fetch(ID)
    assert names_in(found.folder) == {
        "config.json", "model_index.json", "scheduler_config.json", f"{WEIGHTS}.safetensors"
    }  # fmt: skip
    assert found.folder.name == commit
    assert commit in found.log
    here, there = load_checkpoint(flat), load_checkpoint(found.folder)
    assert here.weights_hash == there.weights_hash
    assert there.name == "ddpm-cifar10-32"
    hub.asked.clear()
    assert fetch(ID).folder == found.folder
    assert all(each.startswith(f"GET /api/models/{ID}") for each in hub.asked), "only the newest commit is asked for"


def test_a_pinned_commit_that_is_there_takes_no_call_of_the_hub(hub: Hub, fetch: Fetch, nested: Path) -> None:
    first = hub.push(ID, nested)
    folder = fetch(f"{ID}@{first}").folder
    assert names_in(folder) == names_in(nested)
    hub.push(ID, nested, "second")
    hub.asked.clear()
    assert fetch(f"{ID}@{first}").folder == folder
    assert hub.asked == []


def test_a_branch_that_moved_is_fetched_and_a_tag_stays(
    hub: Hub, fetch: Fetch, fetch_all: FetchAll, nested: Path
) -> None:
    first = hub.push(ID, nested, ref="v1.0")
    hub.push(ID, nested)
    newest, tagged = fetch_all(ID, f"{ID}@v1.0")
    assert newest.folder == tagged.folder
    (changed := nested.parent / "changed").exists() or shutil.copytree(nested, changed)
    (changed / "tminus.json").write_text("{}")
    second = hub.push(ID, changed, "second")
    hub.asked.clear()
    newer = fetch(ID).folder
    assert newer.name == second
    assert not any("/cdn/" in each for each in hub.asked), "weights that are the same are not fetched again"
    assert fetch(f"{ID}@v1.0").folder.name == first


def test_without_the_hub_what_is_in_the_cache_is_taken(hub: Hub, fetch_all: FetchAll, nested: Path) -> None:
    commit = hub.push(ID, nested)
    (first,) = fetch_all(ID)

    def assert_taken_from_cache(**variables: str) -> None:
        again, other = fetch_all(ID, "google/other", **variables)
        assert again.folder == first.folder, again.log
        assert f"commit {commit} of the cache is taken" in again.log
        assert other.refusal.startswith("google/other: no such folder, not in the hub's cache, and ")

    assert_taken_from_cache(HF_HUB_OFFLINE="1")
    assert_taken_from_cache(HF_ENDPOINT="http://127.0.0.1:9")
    hub.fails = True
    assert_taken_from_cache()
    hub.fails, hub.answers_html = False, True  # as a network that one has to log in to
    assert_taken_from_cache()
    hub.silent.set()
    assert_taken_from_cache()


def test_what_another_program_has_fetched_is_taken_without_the_hub(
    hub: Hub, fetch: Fetch, fetch_all: FetchAll, flat: Path
) -> None:
    commit = hub.push(ID, flat)
    folder = fetch(ID, program=ANOTHER_PROGRAM).folder
    assert not (folder / "README.md").exists()
    assert {each.folder for each in fetch_all(ID, f"{ID}@{commit}", HF_HUB_OFFLINE="1")} == {folder}


def test_a_bin_is_fetched_only_where_there_are_no_safetensors(hub: Hub, fetch: Fetch, flat: Path) -> None:
    old = flat.parent / "old"
    shutil.copytree(flat, old)
    (old / f"{WEIGHTS}.safetensors").unlink()
    hub.push(ID, old)
    folder = fetch(ID).folder
    assert f"{WEIGHTS}.bin" in names_in(folder)
    assert load_checkpoint(folder).weights_hash == load_checkpoint(flat).weights_hash


def test_what_was_cut_off_is_fetched_to_its_end(hub: Hub, fetch: Fetch, nested: Path) -> None:
    commit = hub.push(ID, nested)
    folder = fetch(ID).folder
    weights = folder / "unet" / f"{WEIGHTS}.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert fetch(f"{ID}@{commit}").folder == folder
    assert load_checkpoint(folder).name == "ddpm-cifar10-32"


def test_each_mistake_is_one_line_that_names_the_id(hub: Hub, fetch: Fetch, fetch_all: FetchAll, nested: Path) -> None:
    hub.push(ID, nested)
    hub.push("google/private", nested)
    hub.repositories["google/private"].token = "hf_of_the_test"
    hub.push("google/gated", nested)
    hub.repositories["google/gated"].gated = True
    hub.repositories.setdefault("google/text", Repository()).push("only", {"README.md": b"#", "config.json": b"{}"})
    branch, commit = f"{ID}@gone", f"{ID}@{commit_of('gone')}"
    wrong = ("google/nothing", branch, commit, "google/private", "google/gated", "google/text")
    refusals = {given: each.refusal for given, each in zip(wrong, fetch_all(*wrong), strict=True)}
    assert refusals["google/nothing"] == (
        f"google/nothing: no such folder, and no such model at {hub.url}; for a private one give your token by HF_TOKEN"
    )
    for given in (branch, commit):
        revision = given.partition("@")[2]
        assert refusals[given] == f"{given}: the model is there, but has no revision {revision!r}"
    assert "give your token by HF_TOKEN" in refusals["google/private"]
    assert f"ask for it at {hub.url}/google/gated" in refusals["google/gated"]
    assert "holds no diffusion_pytorch_model.safetensors or .bin" in refusals["google/text"]
    assert fetch("google/private", HF_TOKEN="hf_of_the_test").folder.is_dir()
    hub.answers_html = True
    assert "does not answer as a hub does" in fetch("google/page").refusal


def test_names_that_lead_out_of_the_cache_are_not_written(
    hub: Hub, fetch_all: FetchAll, nested: Path, tmp_path: Path
) -> None:
    files = {str(file.relative_to(nested)): file.read_bytes() for file in nested.rglob("*") if file.is_file()}
    names = ("../../../../out.json", "/etc/out.json", "unet/../../../out.json", "samplers/../../out.json")
    for k, name in enumerate(names):
        hub.repositories.setdefault(f"evil/model-{k}", Repository()).push("only", files | {name: b"{}"})
    fetch_all(*(f"evil/model-{k}" for k in range(len(names))))
    assert not list(tmp_path.rglob("out.json"))


def test_a_path_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "ddpm").mkdir(parents=True)
    assert checkpoint_folder("google/ddpm") == Path("google/ddpm")
    # A misspelt path in a folder that is there asks nobody.
    assert checkpoint_folder("google/dpm") == Path("google/dpm")
    for path in ("/google/ddpm", "./runs/a", "runs", "a/b/c", "../a/b", "a/..", "a/b@", "a/b@../c"):
        assert HubId.parse(path) is None, path


def test_without_the_extra_a_line_says_how_to_get_it(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "none" / "huggingface_hub").mkdir(parents=True)
    (tmp_path / "none" / "huggingface_hub" / "__init__.py").write_text("raise ModuleNotFoundError('no')")
    path = f"{tmp_path / 'none'}{os.pathsep}{os.getcwd()}"
    refusal = fetch(ID, PYTHONPATH=path).refusal
    assert refusal.startswith(f"{ID}: no such folder; ")
    assert refusal.endswith("pip install '.[hub]' in a checkout")


def test_only_the_files_of_a_checkpoint_are_fetched(hub: Hub, fetch: Fetch, nested: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    shutil.copytree(nested, extra)
    read = names_in(nested) | {"samplers/a.json"}
    others = {
        *(f"unet/{WEIGHTS}.fp16.safetensors", f"unet/{WEIGHTS}.bin", "checkpoint-500/unet/config.json"),
        *("optimizer.bin", "model.ckpt", "random_states_0.pkl", "unet/code.py", "README.md"),
    }
    for name in {"samplers/a.json"} | others:
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).write_bytes(b"{}")
    hub.push(ID, extra)
    folder = fetch(ID).folder
    assert names_in(folder) == read


def test_a_folder_of_which_a_part_is_missing_is_not_whole(nested: Path, tmp_path: Path) -> None:
    assert is_whole(nested)
    for gone in ("unet", "scheduler", f"unet/{WEIGHTS}.safetensors", "unet/config.json"):
        copy = tmp_path / gone.replace("/", "-")
        shutil.copytree(nested, copy)
        (shutil.rmtree if (copy / gone).is_dir() else Path.unlink)(copy / gone)
        assert not is_whole(copy), gone


@pytest.mark.parametrize("gone", ["config.json", "scheduler_config.json", f"{WEIGHTS}.safetensors"])
def test_a_flat_folder_is_whole_with_all_that_its_index_names(flat: Path, tmp_path: Path, gone: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(flat, copy)
    (copy / f"{WEIGHTS}.bin").unlink()
    assert is_whole(copy)
    (copy / gone).unlink()
    assert not is_whole(copy)


def test_a_model_of_the_cache_is_called_what_its_repository_is() -> None:
    assert hub_name(Path("/c/models--google--ddpm-cifar10-32/snapshots/abc")) == "ddpm-cifar10-32"
    assert hub_name(Path("/c/google/snapshots/abc")) is None
