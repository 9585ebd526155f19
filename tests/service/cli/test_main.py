"""How commands end: Ctrl-C, failures in a line; tests/e2e/test_train.py has `train`, which saves before Ctrl-C."""

import json
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.service.cli.running import line_of, refusal, run
from tminus.model import checkpoint
from tminus.service.cli.main import SECTIONS, main
from tminus.service.cli.output import fail, say, say_json
from tminus.service.engine import loading
from tminus.service.startup.logs import MAX_LINE, printable


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["evaluate"], "interrupted"),
        (["distill", "--checkpoint", "teacher", "--out", "run"], "interrupted"),
        (["tune"], "stopped; the same command goes on after the last table"),
        (["sample"], "interrupted"),
    ],
)
def test_ctrl_c_ends_a_command_with_130_and_one_line(
    command: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    monkeypatch.setattr(loading, "read_checkpoint", load)
    result = run(*command)
    assert (result.exit_code, result.stderr) == (130, f"tminus: {says}\n")


@pytest.mark.parametrize("command", [["train", "--head-dim", "4"], ["train-autoencoder"]])
def test_a_run_that_cannot_be_written_is_one_clear_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "file").touch()
    small = ["--size", "8", "--widths", "8,8", "--groups", "4", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    data = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "file" / "run"), "--precision", "fp32"]
    assert "Not a directory" in refusal(*command, *data, *small)


# A command line in an empty folder, its exit code, and a part of what it says.
REFUSALS = [
    ("config --port abc", 1, "--port (TMINUS_PORT): must be a valid integer"),
    ("config --prot 1", 2, "No such option"),
    ("serve --port abc", 1, "--port (TMINUS_PORT): must be a valid integer"),
    ("sample -n abc", 2, "'abc' is not a valid integer range"),
    ("sample --out a.JPEG", 1, "PNG, so give a name that ends in .png, or a folder's name"),
    ("sample --out a.tar.gz", 1, "PNG, so give a name that ends in .png"),
    ("sample --model colour", 1, "--model needs --url: a server that has it"),
    ("sample --url http://127.0.0.1:9 --model ../x", 1, "model must be 1..64"),
    ("sample --url http://127.0.0.1:9 --checkpoint cpu", 1, "--checkpoint is for a model that this command loads"),
    ("sample --watch a.webp", 1, "--watch needs --url"),
    ("sample --every 2", 1, "--every and --show need --watch"),
    ("reproduce a.png --model colour", 1, "--model needs --url: a server that has it"),
    ("reproduce a.png --url http://127.0.0.1:9 --precision cpu", 1, "--precision is for a model that this command"),
    ("reproduce a.png --out a.npy", 1, "PNG, so give a name that ends in .png"),
    ("reproduce a.png", 1, "a.png"),
    ("bench --mix 1:1x20", 1, "--mix: needs --slo"),
    ("bench --rate 1,2", 1, "--rate, more than one: needs --slo"),
    ("bench --slo 3 --steps 20", 1, "--n and --steps: the requests of --slo are those of --mix"),
    ("bench --slo 3 -n 2", 1, "--n and --steps: the requests of --slo are those of --mix"),
    ("bench --rate 1000 --seconds 60", 1, "--rate times --seconds: must be at most 20000 requests, got 60000"),
    ("bench http://127.0.0.1:9", 1, "is a server running there? tminus serve starts one"),
    ("bench localhost:8000", 1, "url must be http://"),
    ("models --url localhost:8000", 1, "url must be http://"),
    ("models load", 2, "load needs the NAME of a model"),
    ("evaluate --guidance 1,51", 2, "a number, 0..50, got '51'"),
    ("evaluate --seeds 18446744073709551616", 2, "a whole number, 0..2^64-1, got"),
    ("tune --steps 0", 1, "steps must be in 1..1000, got 0"),
    ("tune --steps two", 2, "each must be an integer, got 'two'"),
    ("tune --guidance nan", 2, "each must be a number, got 'nan'"),
    ("tune --teacher ddpm:20", 1, "teacher must be SAMPLER:STEPS"),
    ("tune --checkpoint /nowhere", 1, "/nowhere: no such folder"),
    ("train --data nothing --out run", 1, "nothing: neither fashion-mnist nor a folder of images"),
    ("train --data . --out run", 1, "no image files (.bmp, .gif"),
    ("pull pixel-art", 1, "NAME must be one of "),
    ("pull fashion-mnist-32", 1, "comes with tminus"),
    ("key a/b", 1, "NAME must be"),
    ("key ''", 1, "NAME must be"),
    ("key a --role root", 2, "'root' is not one of"),
    ("key a --jobs 0", 2, "0 is not in the range"),
    ("key a --file /nowhere/keys", 1, "/nowhere/keys: No such file"),
]


@pytest.mark.parametrize(("words", "code", "says"), REFUSALS, ids=[words for words, _, _ in REFUSALS])
def test_a_command_line_that_cannot_be_run_is_refused_and_makes_no_file(
    words: str, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*shlex.split(words))
    assert (result.exit_code, says in result.stderr) == (code, True), result.stderr
    if code == 1:
        assert len(result.stderr.splitlines()) == 1
        assert says in line_of(result)
    assert list(tmp_path.iterdir()) == []


# --- the help ---


def test_tminus_alone_is_its_help_which_begins_with_serve_sample_and_train_and_has_each_command_once() -> None:
    alone, asked = run(), run("--help")
    assert (alone.exit_code, alone.output) == (0, asked.output)
    told = re.findall(r"^  ([a-z-]+)  +\S", alone.output.partition("\nOptions:")[0], re.MULTILINE)
    assert told[:3] == ["serve", "sample", "train"]
    assert sorted(told) == sorted(main.commands)
    assert sorted(told) == sorted(str(each.name) for section in SECTIONS.values() for each in section)


def test_the_list_of_commands_fits_a_terminal_of_80_columns_and_nothing_of_it_is_cut() -> None:
    lines = run("--help").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines[1:] if "..." in line], "but in the usage"


@pytest.mark.parametrize("command", [*main.commands])
def test_each_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    assert max(map(len, result.output.partition("\nOptions:")[0].splitlines())) <= 80


# --- what is written ---


def test_what_could_drive_a_terminal_is_escaped_in_lines_and_text_of_any_script_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printable("\x1b[2J\x07\r\n\x9b31m\u202e\ud800\x7f") == "\\x1b[2J\\x07\\r\\n\\x9b31m\\u202e\\ud800\\x7f"
    assert printable("Schönes Bild, 画像, ok") == "Schönes Bild, 画像, ok"
    assert len(printable("x" * 10**6)) == MAX_LINE + 1
    with pytest.raises(SystemExit):
        fail("a\nb\x1b[2J")
    assert capsys.readouterr().err == "tminus: a\\nb\\x1b[2J\n"
    say("one\ntwo\x1b[2J")
    assert capsys.readouterr().out == "one\ntwo\\x1b[2J\n"
    document = {"a": "\x1b[2J\x7f\u202e\ud800", "b": [1, None]}
    say_json(document)
    line = capsys.readouterr().out
    assert line[:-1].isascii()
    assert line[:-1].isprintable()
    assert json.loads(line) == document
