"""`tminus config`, and --config of `tminus serve`: settings from a file."""

import json
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.cli.running import refusal, run
from tests.service.keys import key_line
from tminus.service.cli.configuration import read_settings
from tminus.service.startup.settings import Settings


@pytest.fixture(autouse=True)
def _no_variables_and_signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    for name in ("config", *Settings.model_fields):
        monkeypatch.delenv(f"TMINUS_{name.upper()}", raising=False)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tminus.toml"


def lines(*arguments: str | Path, **variables: str) -> list[str]:
    result = run("config", *arguments, **variables)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(file: Path) -> None:
    file.write_text('port = 1\nmax-n = 2\nmax_rows = 33\nhost = "::1"\n')
    found = lines("--config", file, "--port", "11", "--changed", TMINUS_PORT="12", TMINUS_MAX_N="13")
    assert found == [
        "max_n = 13  # variable TMINUS_MAX_N",
        "max_rows = 33  # file " + str(file),
        'host = "::1"  # file ' + str(file),
        "port = 11  # flag --port",
    ]
    assert "max_batch" in "".join(lines("--config", file))
    assert lines("--changed", TMINUS_CONFIG=str(file))[0].startswith("max_n = 2 ")
    assert lines("--changed") == []


def test_settings_as_json_have_the_values_and_the_places_of_the_lines(file: Path) -> None:
    file.write_text('max-n = 2\nstate-dir = "Ünï"\n')
    given = ["--config", file, "--port", "11", "--checkpoint", "a=x/y", "--checkpoint", "b"]
    secret = {"TMINUS_WEBHOOK_SECRET": "whsec_" + 32 * "C"}
    told: dict[str, Any] = json.loads("".join(lines(*given, "--json", **secret)))["settings"]
    printed = {}
    for line in lines(*given, **secret):
        setting, _, place = line.rpartition("  # ") if not line.startswith("# ") else line[2:].rpartition("  # ")
        name = setting.split()[0]
        value = tomllib.loads(setting)[name] if " = " in setting else None
        kind, _, by = place.partition(" ")
        printed[name] = {"value": value, "secret": "is secret" in setting, "source": kind, "given_by": by or None}
    assert told == printed
    assert told.keys() == Settings.model_fields.keys()
    assert [name for name, each in told.items() if each["secret"]] == ["webhook_secret"]
    changed = json.loads("".join(lines(*given, "--json", "--changed")))["settings"]
    assert changed.keys() == {"max_n", "state_dir", "port", "checkpoint"}


def test_what_is_printed_is_a_file_of_the_same_settings(file: Path) -> None:
    flags = ["--checkpoint", "a=x/y", "--checkpoint", 'z"z', "--no-exact", "--open", "--grace-s", "1.5"]
    flags += ["--state-dir", "Ünï"]
    file.write_text("\n".join(lines(*flags)))
    assert tomllib.loads(file.read_text())["checkpoint"] == ["a=x/y", 'z"z']
    read, _ = read_settings(Settings, file, {})
    assert (read.checkpoint, read.exact, read.open, read.grace_s) == (("a=x/y", 'z"z'), False, True, 1.5)
    again, first = ([line.partition("  # ")[0] for line in lines(*given)] for given in (("--config", file), flags))
    assert again == first


def test_a_secret_is_not_printed_nor_repeated_where_it_has_a_mistake(file: Path) -> None:
    (line,) = lines("--changed", TMINUS_KEYS=key_line("a", "secret"))
    assert line == "# keys is secret: give it by TMINUS_KEYS  # variable TMINUS_KEYS"
    file.write_text("keys = 'tm_secret'\nport = 0")
    line = refusal("serve", "--config", file)
    assert line.startswith("tminus: TMINUS_KEYS: line 1")
    assert "tm_secret" not in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"port = 'x'", "--port (TMINUS_PORT) in"),
        (b"porto = 1", "'porto', and there is no such setting"),
        (b"max-n = 1\nmax_n = 2", "twice"),
        (b"port = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b"#" * (2**20 + 1), "more than 1048576 bytes"),
        (None, "No such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(file: Path, text: bytes | None, said: str) -> None:
    if text is not None:
        file.write_bytes(text)
    for command in ("config", "serve"):
        line = refusal(command, "--config", file)
        assert said in line
        assert str(file) in line
