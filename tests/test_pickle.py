"""A pickle with code, put where we read, runs nothing. That no module writes or runs one is for `make lint`."""

import io
import json
import pickle
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.service.fakes import INFO, make_spec
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.evaluation.classifier import ClassifierError, load_classifier
from tminus.model.evaluation.evaluate import ResultCache
from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import GivenFacts
from tminus.model.formats.read import read_foreign
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder, save_autoencoder
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import read_tables
from tminus.model.training.data import DataError, load_image_folder, read_idx
from tminus.model.training.run import STATE_FILE, Run, read_state
from tminus.model.unet import UNet2D
from tminus.model.weights import load_state_dict
from tminus.service.access.keys import KeyRing
from tminus.service.cli.configuration import read_file
from tminus.service.engine.choice_cache import ChoiceCache
from tminus.service.errors import ServiceError, StorageFailed
from tminus.service.images.decoder import decode_inputs
from tminus.service.jobs.store.arrays import UNREADABLE, unpack_images, unpack_inputs, unpack_snapshot
from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.sqlite_store import SqliteStore, open_store
from tminus.service.spec import Snapshot

ROOT = Path(__file__).parents[1]
FIRST = NoiseConfig(num_train_timesteps=20, beta_end=0.3)
GIVEN = GivenFacts(image_size=8, timesteps=20, beta_schedule="linear", prediction="epsilon", variance="fixed_large")
KL = AutoencoderConfig(
    kind="AutoencoderKL",
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(8,),
    norm_num_groups=4,
)


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.proof,)


def by_torch(value: object, *, old: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def by_numpy(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([value], dtype=object), allow_pickle=True)
    return file.getvalue()


FORMS: dict[str, Callable[[object], bytes]] = {
    "pickle": lambda value: pickle.dumps(value, protocol=2),
    "torch.save": partial(by_torch, old=False),
    "torch.save, old format": partial(by_torch, old=True),
    "np.save": by_numpy,
    "pickle, compressed": lambda value: zlib.compress(pickle.dumps(value)),
}


def refused(error: type[BaseException] | tuple[type[BaseException], ...], read: Callable[[], object]) -> None:
    with pytest.raises(error):
        read()


def of_the_unet(suffix: str, folder: Path, data: bytes) -> None:
    net = UNet2D(TINY)
    randomize(net)
    save_checkpoint(folder, net.state_dict(), TINY, FIRST, Labels(), {})
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(data)
    refused(CheckpointError, lambda: load_checkpoint(folder))


def of_a_shard(folder: Path, data: bytes) -> None:
    (folder / "part.pkl").write_bytes(data)
    index = {"weight_map": {"conv_in.bias": "part.pkl"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(CheckpointError, lambda: load_state_dict(folder))


def of_a_document(name: str, folder: Path, data: bytes) -> None:
    net = UNet2D(TINY)
    randomize(net)
    save_checkpoint(folder, net.state_dict(), TINY, FIRST, Labels(), {})
    assert (folder / name).is_file()
    (folder / name).write_bytes(data)
    refused(CheckpointError, lambda: load_checkpoint(folder))


def of_the_autoencoder(suffix: str, folder: Path, data: bytes) -> None:
    save_autoencoder(folder, KL, Autoencoder(KL).state_dict())
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(data)
    refused(CheckpointError, lambda: load_autoencoder(folder))


def of_the_classifier(folder: Path, data: bytes) -> None:
    shutil.copytree(ROOT / "checkpoints" / "fashion-mnist-classifier", folder, dirs_exist_ok=True)
    load_classifier(folder, device=torch.device("cpu"))
    (folder / "classifier.safetensors").write_bytes(data)
    refused(ClassifierError, lambda: load_classifier(folder, device=torch.device("cpu")))


def of_a_run(folder: Path, data: bytes) -> None:
    (folder / STATE_FILE).write_bytes(data)
    assert Run(folder, "train", None).begun
    refused(Exception, lambda: read_state(folder))


def of_another_project(suffix: str, folder: Path, data: bytes) -> None:
    (folder / f"file{suffix}").write_bytes(data)
    refused(CheckpointError, lambda: read_foreign(folder / f"file{suffix}", GIVEN))


def of_a_table(folder: Path, data: bytes) -> None:
    (folder / "samplers").mkdir()
    (folder / "samplers" / "tuned-5.json").write_bytes(data)
    tables, lines = read_tables(folder, "", {}, num_timesteps=20, null_class=False, fractional=False)
    assert (len(tables), len(lines)) == (0, 1)


def of_an_evaluation(folder: Path, data: bytes) -> None:
    kept = ResultCache(folder)
    kept.write({"a": 1}, {"b": 2})
    (file,) = folder.glob("*.json")
    file.write_bytes(data)
    assert kept.read({"a": 1}) is None


def of_what_was_measured(folder: Path, data: bytes) -> None:
    cache = ChoiceCache.__new__(ChoiceCache)  # its name is a hash of a checkpoint and the machine
    cache.file = folder / "choice.json"
    cache.file.write_bytes(data)
    assert cache.read() is None


def of_the_job_store(folder: Path, data: bytes) -> None:
    open_store(str(folder), "0" * 64).close()
    (file,) = folder.glob("*.sqlite3")
    file.write_bytes(data)
    refused(ValueError, lambda: open_store(str(folder), "0" * 64))


def of_a_column(table: str, column: str, folder: Path, data: bytes) -> None:
    """Of a job that is kept with all that can be kept of one."""
    file = folder / "jobs.sqlite3"
    x = np.zeros((1, 1, 4, 6), np.float32)
    pixels = np.zeros((1, 4, 6, 1), np.uint8)
    with closing(SqliteStore(file)) as store:
        store.add(JobRecord("a", make_spec(), 1))
        store.save({"a": Snapshot((0,), x, x, x[:, None])}, "build")
        store.add(JobRecord("b", make_spec(), 2))
        store.finish(JobRecord("b", make_spec(), 2, outcome="done", finished_us=3), pixels)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute(f"UPDATE {table} SET {column} = ?", (data,)).rowcount
        connection.commit()
    with closing(SqliteStore(file)) as store:
        match table:
            case "snapshots":
                assert store.snapshot("a", "build") is None
            case "images":
                packed = store.images("b")
                assert isinstance(packed, bytes)
                refused(UNREADABLE, lambda: unpack_images(packed))
            case _:
                refused(StorageFailed, lambda: store.get("a"))


def of_arrays(unpack: Callable[[bytes], object], _folder: Path, data: bytes) -> None:
    refused(UNREADABLE, lambda: unpack(data))


def of_an_upload(field: str, _folder: Path, data: bytes) -> None:
    picture = (ROOT / "docs" / "images" / "upper-half.png").read_bytes()
    image, mask = (data, None) if field == "image" else (picture, data)
    refused(ServiceError, lambda: decode_inputs(image, mask, INFO))


def of_the_keys(folder: Path, data: bytes) -> None:
    (folder / "keys").write_bytes(data)
    refused(ValueError, lambda: KeyRing(file=folder / "keys"))


def of_the_settings(folder: Path, data: bytes) -> None:
    (folder / "tminus.toml").write_bytes(data)
    refused(SystemExit, lambda: read_file(folder / "tminus.toml"))


def of_training_images(folder: Path, data: bytes) -> None:
    (folder / "a.png").write_bytes(data)
    refused(DataError, lambda: load_image_folder(folder, 8, 1))
    refused(DataError, lambda: read_idx(folder / "a.png"))


PLACES: dict[str, Callable[[Path, bytes], None]] = {
    "a checkpoint's weights": partial(of_the_unet, ".safetensors"),
    "a checkpoint's weights as .bin": partial(of_the_unet, ".bin"),
    "a shard of a checkpoint's weights": of_a_shard,
    "unet/config.json": partial(of_a_document, "unet/config.json"),
    "scheduler_config.json": partial(of_a_document, "scheduler/scheduler_config.json"),
    "tminus.json": partial(of_a_document, "tminus.json"),
    "an autoencoder's weights": partial(of_the_autoencoder, ".safetensors"),
    "an autoencoder's weights as .bin": partial(of_the_autoencoder, ".bin"),
    "the classifier": of_the_classifier,
    "a run of training": of_a_run,
    "a file to convert, .pt": partial(of_another_project, ".pt"),
    "a file to convert, .ckpt": partial(of_another_project, ".ckpt"),
    "a file to convert, .safetensors": partial(of_another_project, ".safetensors"),
    "a table": of_a_table,
    "figures of an evaluation": of_an_evaluation,
    "what was measured": of_what_was_measured,
    "the file of jobs": of_the_job_store,
    "a job's spec": partial(of_a_column, "jobs", "spec"),
    "a job's snapshot in the file": partial(of_a_column, "snapshots", "data"),
    "a job's images in the file": partial(of_a_column, "images", "data"),
    "a snapshot": partial(of_arrays, unpack_snapshot),
    "inputs": partial(of_arrays, unpack_inputs),
    "images": partial(of_arrays, unpack_images),
    "an uploaded image": partial(of_an_upload, "image"),
    "an uploaded mask": partial(of_an_upload, "mask"),
    "the file of keys": of_the_keys,
    "the file of settings": of_the_settings,
    "training images": of_training_images,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_with_code_runs_nothing(place: str, tmp_path: Path) -> None:
    proof = tmp_path / "the code ran"
    for number, (form, made) in enumerate(FORMS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        PLACES[place](folder, made({"conv_in.bias": Exploit(proof)}))
        assert not proof.exists(), form


@pytest.mark.filterwarnings("ignore")
def test_the_exploit_is_a_real_one(tmp_path: Path) -> None:
    readers: dict[str, Callable[[bytes], object]] = {
        "pickle": pickle.loads,
        "torch.save": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "torch.save, old format": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "np.save": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "pickle, compressed": lambda data: pickle.loads(zlib.decompress(data)),
    }
    assert readers.keys() == FORMS.keys()
    for form, read in readers.items():
        proof = tmp_path / form
        read(FORMS[form]({"conv_in.bias": Exploit(proof)}))
        assert proof.exists(), form
