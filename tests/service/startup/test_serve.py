import asyncio
import gc
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.service.conftest import MakeCheckpoint
from tests.service.jobs.kept import job
from tminus.model.checkpoint import needs_of, save_checkpoint
from tminus.service.engine import devices, loading, openvino_executor
from tminus.service.jobs.crash_report import CrashFile
from tminus.service.jobs.store.async_store import Stores
from tminus.service.jobs.store.sqlite_store import SqliteStore, open_store
from tminus.service.startup import serve
from tminus.service.startup.server import Opening
from tminus.service.startup.settings import Settings


class Weights:
    """What a model takes memory by."""


def test_what_a_model_took_that_cannot_be_served_is_freed_before_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[weakref.ref[Weights]] = []
    freed: list[bool] = []

    def prepare_engine(checkpoint: Any, *_args: object, **_kwargs: object) -> Any:
        weights = Weights()
        taken.extend([weakref.ref(weights), weakref.ref(checkpoint.net)])
        raise ValueError("does not give the same bits alone and among others here")

    def release_memory() -> None:
        gc.collect()
        freed.extend(each() is None for each in taken)

    def read_models(_settings: Settings) -> tuple[list[loading.ReadModel], list[object]]:
        checkpoint: Any = SimpleNamespace(weights_hash="ab" * 32, net=Weights())
        return [loading.ReadModel("a", tmp_path, checkpoint)], []

    monkeypatch.setattr(serve, "read_models", read_models)
    monkeypatch.setattr(loading, "prepare_engine", prepare_engine)
    monkeypatch.setattr(devices, "release_memory", release_memory)
    opened = serve.open_all(Settings(state_dir=str(tmp_path / "state")), ("127.0.0.1", 8000))
    with pytest.raises(ValueError, match="the same bits"):
        serve.measure_and_build(opened, None, Opening())
    assert freed == [True, True]


def test_a_start_on_a_cpu_says_first_of_all_that_openvino_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_executor, "openvino", None)
    for executor in ("auto", "eager"):
        with pytest.raises(ValueError, match="nothing-here"):
            serve.read_models(Settings(checkpoint=[str(tmp_path / "nothing-here")], device="cpu", executor=executor))
    (line,) = caplog.messages  # none if eager is asked for
    assert "OpenVINO is missing" in line
    assert "pip install '.[openvino]' in a checkout" in line


@pytest.fixture
def three(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A folder of three models, of which each takes as much."""
    for seed, name in enumerate("abc"):
        made = make_checkpoint(seed=seed)
        save_checkpoint(tmp_path / name, made.net.state_dict(), made.net.config, made.noise, made.labels, {})
    return tmp_path


def test_of_a_folder_of_models_those_beyond_the_memory_that_is_given_are_left_for_later(
    three: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_gb = needs_of(three / "a").serving_bytes / 2**30
    settings = Settings(models=three, models_memory_gb=2.5 * one_gb)
    assert [model.name for model in serve.read_models(settings)[0]] == ["a", "b"]
    assert re.search(
        r"c is not loaded: it takes about .* GiB, and .* GiB of --models-memory-gb .* are left", caplog.text
    )
    with pytest.raises(ValueError, match=r"a: it takes about .* GiB, and .* are left"):
        serve.read_models(Settings(models_memory_gb=0.5 * one_gb, checkpoint=(str(three / "a"),)))
    for idle_unload in (None, "1m"):
        none = Settings(models_memory_gb=0.5 * one_gb, models=three, idle_unload=idle_unload)
        with pytest.raises(ValueError, match=r"GiB, and the smallest of the models, a, takes about .*"):
            serve.read_models(none)
    with pytest.raises(ValueError, match="b: it takes"):
        serve.read_models(Settings(models_memory_gb=1.5 * one_gb, checkpoint=(str(three / "a"), str(three / "b"))))
    preparer = serve.Preparer(settings)
    assert preparer.room_lacking(three / "c", int(1.5 * one_gb * 2**30)) is None
    assert re.match("takes about .* are left", preparer.room_lacking(three / "c", int(1.6 * one_gb * 2**30)) or "")


def test_with_an_idle_time_only_the_default_model_is_in_memory_from_the_start(three: Path) -> None:
    one_gb = needs_of(three / "a").serving_bytes / 2**30
    models, unloaded = serve.read_models(Settings(models=three, models_memory_gb=1.1 * one_gb, idle_unload="15m"))
    assert [model.name for model in models] == ["a"]
    assert [(model.info.name, model.info.fingerprint) for model in unloaded] == [("b", ""), ("c", "")]
    assert unloaded[0].info.weights_hash != models[0].weights_hash


DIES = """
import ctypes, sys
from pathlib import Path
from tminus.service.jobs.crash_report import CrashFile

CrashFile(Path(sys.argv[1]), sys.argv[2]).work_on("steps", ["a"])
ctypes.string_at(0)
"""


def test_an_end_is_counted_once_in_each_store_also_in_those_of_models_that_are_loaded_later(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The job "a" was of the model that was served before a reload, whose weights no checkpoint has at the start."""
    checkpoints = {made.weights_hash: made for made in (make_checkpoint(seed=seed) for seed in (0, 1))}
    served, reloaded = checkpoints
    states = str(tmp_path / "states")
    for weights in (served, reloaded):
        store = open_store(states, weights)
        store.add(job("a"))
        store.close()

    def start(weights: str) -> tuple[Stores, CrashFile]:
        made, folder = checkpoints[weights], tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, made.net.state_dict(), made.net.config, made.noise, made.labels, {})
        opened = serve.open_all(Settings(state_dir=states, checkpoint=str(folder)), ("127.0.0.1", 8000))
        assert opened.crash_file_place is not None
        return opened.stores, CrashFile(*opened.crash_file_place)

    stores, crash_file = start(reloaded)
    stores.close()
    crash_file.close()
    prefix = crash_file._file.name.rpartition("-")[0]
    subprocess.run([sys.executable, "-c", DIES, states, prefix], check=False, timeout=60)

    stores, crash_file = start(served)

    async def crashes(weights: str) -> list[int]:
        store = await stores.take(weights)
        claimed = await store.call(SqliteStore.claim_all)
        await stores.release(weights)
        return [record.crashes for record in claimed.jobs]

    for weights in (served, reloaded, reloaded):
        assert asyncio.run(crashes(weights)) == [1]
    crash_file.close()
    assert not list(Path(states).glob("*.end"))


def test_the_password_of_a_database_may_change_but_another_database_has_other_ends(tmp_path: Path) -> None:
    def place(url: str, folder: str = "a") -> object:
        return serve.read_crash_reports(Settings(state_dir=str(tmp_path), job_store=url), Path(folder))[0]  # type: ignore[arg-type]

    one = place("postgresql://me:secret@host/one")
    assert place("postgresql://me:changed@host/one") == one
    assert one not in (place("postgresql://me:secret@host/two"), place("postgresql://me:secret@host/one", "b"))
