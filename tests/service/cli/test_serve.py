"""`tminus serve` before it listens: a state folder or a checkpoint that cannot be used ends in one line."""

import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.service.cli import running
from tminus.model.weights import hash_weights
from tminus.service.jobs.store.sqlite_store import SqliteStore

BUNDLED = Path(__file__).parents[3] / "checkpoints" / "fashion-mnist-32"
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


refusal = partial(running.refusal, "serve", "--port", "0")


# --- the state folder ---


def test_a_state_folder_that_cannot_be_used_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / f"jobs-{hash_weights(load_file(BUNDLED / WEIGHTS))[:16]}.sqlite3"
    newer = "PRAGMA application_id = 1953327470; PRAGMA user_version = 99; CREATE TABLE jobs (a);"
    with sqlite3.connect(file) as connection:
        connection.executescript(newer)
    connection.close()
    for content in (file.read_bytes(), os.urandom(10_000)):
        file.write_bytes(content)
        line = refusal("--state-dir", tmp_path)
        assert "nothing was changed" in line
        assert str(file) in line
        assert file.read_bytes() == content
    file.unlink()
    SqliteStore(file).close()
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE jobs")
    connection.close()
    line = refusal("--state-dir", tmp_path)
    assert line.startswith("tminus: --state-dir (TMINUS_STATE_DIR): ")
    assert "no such table: jobs" in line
    (tmp_path / "file").touch()
    assert "no folder for durable jobs can be made" in refusal("--state-dir", tmp_path / "file")


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
