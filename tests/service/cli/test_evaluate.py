"""`tminus evaluate` over several samplers, steps and seeds, on a toy checkpoint and folders of pictures."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tests.model.evaluation.toys import toy_checkpoint
from tests.service.cli.running import line_of, run
from tminus.model.catalogue import ladder_of
from tminus.model.checkpoint import load_checkpoint, save_checkpoint
from tminus.model.evaluation import evaluate as measure
from tminus.service.cli.options import comma_separated
from tminus.service.engine import autotune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a checkpoint and the images it is compared with."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for split in ("train", "held-out"):
        for name, least in (("bright", 150), ("dark", 0), ("striped", 80)):
            (root / split / name).mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(least, least + 60, (8, 8), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    toy = toy_checkpoint()
    save_checkpoint(root / "toy", toy.net.state_dict(), toy.net.config, toy.noise, toy.labels, {})
    return ["--checkpoint", str(root / "toy"), "--data", str(root / "train"), "--test-data", str(root / "held-out")]


SMALL = (
    *("--num-samples", "6", "--bound-images", "4", "--bound-timesteps", "3"),
    *("--executor", "eager", "--device", "cpu"),
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setattr(autotune, "TRIAL_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(folders: list[str], *arguments: str | Path) -> Result:
    return run("evaluate", *folders, *SMALL, *arguments)


def refusal(folders: list[str], *arguments: str | Path) -> str:
    return line_of(evaluate(folders, *arguments))


def test_a_sweep_prints_its_table_and_writes_a_report_that_names_its_command(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = ("--sampler", "ddim,dpmpp_2m", "--steps", "2,3,50", "--seeds", "0,1", "--reference", "ddpm:20")
    files = ("--report", str(tmp_path / "a report"), "--json", str(tmp_path / "figures.json"))
    arguments = ["evaluate", *folders, *SMALL, *points, *files]
    monkeypatch.setattr("sys.argv", ["/usr/bin/tminus", *arguments])
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [line.split(" | ")[:3] for line in result.stdout.splitlines()]
    for row in (["| ddim", "2", "2"], ["| ddim", "3", "3"], ["| dpmpp_2m", "3", "3"], ["| ddpm", "20", "20"]):
        assert row in rows
    assert "Left out: ddim, 50 steps (steps must be 1..20, got 50)." in result.stdout
    assert str(tmp_path / "a report" / "report.html") in result.stdout
    written = {path.name: path for path in (tmp_path / "a report").iterdir()}
    assert written.keys() == {"report.html", "figures.json", "distances.svg", "terms.svg", "kept"}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads(written["figures.json"].read_text())
    assert [len(point["seeds"]) for point in figures["points"]] == [2] * 4
    page = written["report.html"].read_text()
    command = next(line for line in page.splitlines() if "<pre>" in line).partition("<pre>")[2].partition("</pre>")[0]
    words = shlex.split(command.replace("&#x27;", "'"))
    assert words == ["tminus", *arguments]

    monkeypatch.setattr(measure, "draw_samples", None)
    again = run(*words[1:])
    assert again.exit_code == 0, (again.output, again.exception)
    assert again.stdout == result.stdout
    assert written["report.html"].read_text() == page


def test_a_ladder_gets_the_measured_settings_of_a_checkpoint_and_of_its_student(
    folders: list[str], tmp_path: Path
) -> None:
    teacher = shutil.copytree(folders[1], tmp_path / "teacher")
    student = shutil.copytree(folders[1], tmp_path / "student")
    for folder, steps, guidance in ((teacher, "9,5", "1"), (teacher, "9,6", "1"), (student, "1", "1")):
        options = ("--sampler", "ddim", "--steps", steps, "--guidance", guidance, "--ladder", teacher)
        result = run("evaluate", "--checkpoint", str(folder), *folders[2:], *SMALL, *map(str, options))
        assert result.exit_code == 0, (result.output, result.exception)
        assert "the ladder, from the best setting to the fastest:" in result.stdout
    rungs = load_checkpoint(teacher).ladder
    assert rungs == load_checkpoint(teacher).stated_ladder
    assert {(rung.model, rung.steps) for rung in rungs} <= {(None, 9), (None, 6), (None, 5), ("toy", 1)}
    assert (rungs[-1].model, rungs[-1].steps, rungs[-1].passes) == ("toy", 1, 1), "the fastest is never left out"
    assert all(0 < rung.pixel_distance < 1e9 for rung in rungs if rung.pixel_distance is not None)
    assert ladder_of(rungs) == rungs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sampler", "ddim,dpm"), "sampler must be all or among ddpm, ddim, "),
        (("--reference", "ddpm"), "--reference: must be a sampler and a number of steps, as ddpm:1000, got 'ddpm'"),
        (("--approve",), "--approve: needs a --precision below float32"),
        (("--approve", "--precision", "bfloat16", "--seeds", "0,1"), "--approve: compares one sampler"),
        (("--steps", "3", "--spacing", "lu"), "spacing must be among"),
        (("--ladder", ".", "--eta", "0.5"), "--ladder: a setting is a sampler, steps and guidance; leave out --eta"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(folders: list[str], arguments: tuple[str, ...], says: str) -> None:
    assert says in refusal(folders, *arguments)


def test_figures_are_not_lost_where_the_checkpoint_cannot_be_written(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*of: object) -> None:
        raise OSError(30, "Read-only file system", "tminus.json")

    monkeypatch.setattr("tminus.service.cli.evaluate.judge_precision", judge)
    result = evaluate(
        folders, "--approve", "--precision", "bfloat16", "--steps", "2", "--json", tmp_path / "figures.json"
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "tminus: [Errno 30] Read-only file system: 'tminus.json'"
    assert "variational bound" in result.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["bound"]


@pytest.mark.parametrize(
    ("provenance", "told"), [({}, "its tminus.json names no data"), ({"data": "photos"}, "it was trained on 'photos'")]
)
def test_the_data_is_asked_for_that_the_checkpoint_was_trained_on(
    provenance: dict[str, str], told: str, tmp_path: Path
) -> None:
    toy = toy_checkpoint()
    save_checkpoint(tmp_path, toy.net.state_dict(), toy.net.config, toy.noise, toy.labels, provenance)
    line = refusal(["--checkpoint", str(tmp_path)], "--steps", "2")
    assert line == f"tminus: --data: name the folder of images that {tmp_path} was trained on ({told}), and --test-data"


def test_one_that_was_trained_on_fashion_mnist_is_measured_with_it(tmp_path: Path) -> None:
    toy, nowhere = toy_checkpoint(), tmp_path / "nowhere"
    data = {"data": "fashion-mnist train"}
    save_checkpoint(tmp_path, toy.net.state_dict(), toy.net.config, toy.noise, toy.labels, data)
    line = refusal(["--checkpoint", str(tmp_path)], "--steps", "2", "--data-dir", nowhere)
    assert line.startswith(f"tminus: {nowhere}: not there (apt-get install dataset-fashion-mnist")


@pytest.mark.parametrize("error", [OSError("no space"), torch.OutOfMemoryError("no room")])
def test_a_full_disk_and_a_full_gpu_are_one_clear_line(
    folders: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*of: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tminus.model.evaluation.evaluate.evaluate", evaluated)
    assert refusal(folders, "--steps", "2") == f"tminus: {error}"


# --- options of several values ---

NUMBERS = comma_separated(int, "a whole number, 1..9", lambda number: bool(1 <= number <= 9))


@click.command("measure")
@click.option("-n", "--numbers", "--number", "numbers", callback=NUMBERS, default="3")
def measured(numbers: tuple[int, ...]) -> None:
    click.echo(repr(numbers))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(measured, list(arguments))


@pytest.mark.parametrize(
    ("text", "values"),
    [("5", (5,)), ("1,2,9", (1, 2, 9)), (" 2 , 1 ", (2, 1)), ("4,4,1,4", (4, 1))],
)
def test_a_list_is_read_in_its_order_each_value_once(text: str, values: tuple[int, ...]) -> None:
    assert invoke("--numbers", text).output.splitlines()[0] == repr(values)
    assert invoke("--number", text).output.splitlines()[0] == repr(values)


@pytest.mark.parametrize(
    ("text", "bad"), [("", ""), ("1,", ""), ("1,0", "0"), ("1;2", "1;2"), ("1,x", "x"), ("10", "10")]
)
def test_a_bad_value_is_named_with_its_option_and_bound(text: str, bad: str) -> None:
    result = invoke("--numbers", text)
    assert result.exit_code == 2
    assert "--numbers" in result.output
    assert f"each must be a whole number, 1..9, got {bad!r}" in result.output
