"""`tminus serve` before it listens: a state folder or a checkpoint that cannot be used ends in one line."""

import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.service.cli import running
from tests.service.fakes import INFO
from tminus.service.jobs.store.sqlite_store import SqliteStore

BUNDLED = Path(__file__).parents[3] / "checkpoints" / "fashion-mnist-32"
LISTENER = SimpleNamespace(getsockname=lambda: ("127.0.0.1", 0), close=lambda: None)
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _no_socket_and_signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tminus.service.startup.serve.listen", lambda host, port: LISTENER)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


refusal = partial(running.refusal, "serve", "--port", "0")


# --- the state folder ---


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for a checkpoint that needs no loading; nothing is measured before the folder is looked at."""

    def measure(*_: object) -> None:
        raise AssertionError("the state folder is found out first")

    monkeypatch.setattr("tminus.service.engine.loading.read_checkpoint", lambda options: INFO)
    monkeypatch.setattr("tminus.service.engine.loading.prepare_engine", measure)
    return tmp_path


def file_of(state: Path) -> Path:
    return state / f"jobs-{INFO.weights_hash[:16]}.sqlite3"


def test_a_state_folder_that_cannot_be_used_is_refused_and_stays_as_it_is(state: Path) -> None:
    file = file_of(state)
    newer = "PRAGMA application_id = 1953327470; PRAGMA user_version = 99; CREATE TABLE jobs (a);"
    with sqlite3.connect(file) as connection:
        connection.executescript(newer)
    connection.close()
    for content in (file.read_bytes(), os.urandom(10_000)):
        file.write_bytes(content)
        line = refusal("--state-dir", state)
        assert "nothing was changed" in line
        assert str(file) in line
        assert file.read_bytes() == content
    file.unlink()
    SqliteStore(file).close()
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE jobs")
    connection.close()
    line = refusal("--state-dir", state)
    assert line.startswith("tminus: --state-dir (TMINUS_STATE_DIR): ")
    assert "no such table: jobs" in line
    (state / "file").touch()
    assert "no folder for durable jobs can be made" in refusal("--state-dir", state / "file")


# --- the checkpoint ---


def test_a_bad_checkpoint_is_refused(tmp_path: Path) -> None:
    """tests/model/test_checkpoint.py has all the ways in which one can be bad."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    line = refusal("--checkpoint", folder, "--state-dir", ":memory:")
    assert "truncated" in line
    assert str(tmp_path) in line
    shutil.rmtree(folder)
    assert "no such folder" in refusal("--checkpoint", folder, "--state-dir", ":memory:")
