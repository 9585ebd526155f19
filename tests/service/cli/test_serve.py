"""`tminus serve` before it listens: a state folder or a checkpoint that cannot be used ends in one line."""

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click.testing
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.service.fakes import INFO
from tminus.service.cli.main import main
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


def refusal(*arguments: str | Path) -> str:
    """The one line that a start ends in."""
    result = click.testing.CliRunner().invoke(main, ["serve", "--port", "0", *map(str, arguments)])
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "no traceback"
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("tminus: ")
    return line


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


def write_newer(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.executescript("PRAGMA application_id = 1953327470; PRAGMA user_version = 99; CREATE TABLE jobs (a);")
    connection.close()


def write_damaged(file: Path) -> None:
    file.write_bytes(os.urandom(10_000))


@pytest.mark.parametrize("write", [write_newer, write_damaged])
def test_a_database_that_cannot_be_used_is_refused_and_stays_as_it_is(
    state: Path, write: Callable[[Path], None]
) -> None:
    file = file_of(state)
    write(file)
    before = file.read_bytes()
    line = refusal("--state-dir", state)
    assert "nothing was changed" in line
    assert str(file) in line
    assert file.read_bytes() == before


def test_a_database_without_its_tables_is_refused(state: Path) -> None:
    SqliteStore(file_of(state)).close()
    with sqlite3.connect(file_of(state)) as connection:
        connection.execute("DROP TABLE jobs")
    connection.close()
    line = refusal("--state-dir", state)
    assert line.startswith("tminus: --state-dir (TMINUS_STATE_DIR): ")
    assert "no such table: jobs" in line


def test_a_state_folder_that_cannot_be_made_is_refused(state: Path) -> None:
    (state / "file").touch()
    assert "no folder for durable jobs can be made" in refusal("--state-dir", state / "file")


# --- the checkpoint ---


def break_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def break_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def break_truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def break_shapes(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["conv_in.weight"] = torch.zeros(32, 3, 3, 3)
    save_file(state, folder / WEIGHTS)


def break_nan(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"][0] = torch.nan
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_missing, "no such folder"),
        (break_empty, "empty"),
        (break_truncated, "truncated"),
        (break_shapes, "wrong shape of conv_in.weight"),
        (break_nan, "NaN"),
    ],
)
def test_a_bad_checkpoint_is_refused(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    damage(folder)
    line = refusal("--checkpoint", folder, "--state-dir", ":memory:")
    assert says in line
    assert str(tmp_path) in line


# --- --help ---


def test_help_says_what_each_flag_takes_as_the_settings_page_does() -> None:
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text("utf-8")
    rows = {row[0].split("`")[1]: row[2] for line in page.splitlines() if line.startswith("| `--")
            if (row := line.strip("| ").split(" | "))}  # fmt: skip
    options = {option.opts[0]: option for option in main.commands["serve"].params}
    assert len(rows) > 20
    for flag, values in rows.items():
        metavar = options[flag].metavar
        if "`" in values:
            assert metavar == values.replace("`", "").replace(", ", "|")
        elif values in ("path", "text"):
            assert metavar == values.upper()
        elif values != "yes or no":
            kind, bounds = str(metavar).split(" ", 1)
            assert kind in ("INTEGER", "FLOAT")
            assert bounds == values.replace(" or more", "..")
