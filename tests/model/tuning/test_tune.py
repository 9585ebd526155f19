"""An interrupted run ends as an undisturbed one; what cannot be tuned is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.tuning.nets import CONFIG, CPU
from tminus.model.checkpoint import Checkpoint, Labels, load_checkpoint
from tminus.model.sampler_tables import FOLDER
from tminus.model.tuning.refine import Refiner
from tminus.model.tuning.tune import TuneError, check, default_teacher, tune

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster precision is not measured: the result would depend on the machine."""
    monkeypatch.setattr("tminus.model.tuning.tune.faster_of", lambda *_: "fp32")


def run(
    folder: Path,
    *,
    steps: tuple[int, ...] = (3,),
    guidance: float = 1.0,
    stop_at: str | None = None,
    threads: int | None = None,
) -> list[str]:
    """Tune; stop_at kills the run when a line of its progress has these words."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if stop_at is not None and stop_at in line:
            raise KeyboardInterrupt

    checkpoint = load_checkpoint(folder)
    tune(folder, checkpoint, checkpoint.net, steps, [guidance], CONFIG, device=CPU, say=say, threads=threads)
    return said


def test_a_run_that_was_killed_keeps_its_tables_and_goes_on_with_the_next(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, steps=(2, 3), stop_at="3 steps at guidance 1: coefficients")
    loaded = load_checkpoint(folder)
    assert ([table.steps for table in loaded.tables], loaded.refused_tables) == ([2], ()), "nothing half-finished"
    assert "2 steps at guidance 1: tuned already" in run(folder, steps=(2, 3))
    assert [table.steps for table in load_checkpoint(folder).tables] == [2, 3]


def test_a_table_that_is_there_is_left_and_one_of_other_settings_is_made_anew(folder: Path) -> None:
    run(folder, steps=(1, 2))
    loaded = load_checkpoint(folder)
    assert [(table.steps, table.guidance) for table in loaded.tables] == [(1, 1.0), (2, 1.0)]
    assert loaded.samplers[-1] == "tuned"
    assert loaded.tables[0].about["held_out_error"].keys() > {"tuned"}
    before = (folder / FOLDER / "tuned-2.json").stat().st_mtime_ns
    recommended = load_checkpoint(folder).settings
    assert run(folder, steps=(2,)) == [
        "2 steps at guidance 1: tuned already",
        f"recommended as before: {recommended} (these tables were judged already)",
    ]
    assert (folder / FOLDER / "tuned-2.json").stat().st_mtime_ns == before
    run(folder, steps=(2,), guidance=2.0)
    assert [(table.steps, table.guidance) for table in load_checkpoint(folder).tables] == [(1, 1.0), (2, 1.0), (2, 2.0)]


def test_a_table_that_is_as_exact_is_recommended_and_the_same_command_finds_all_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_before = load_checkpoint(folder).weights_hash
    edit_recommended(folder, {"sampler": "euler", "steps": 4})
    said = run(folder, steps=(2, 3))
    loaded = load_checkpoint(folder)
    assert loaded.recommended is not None
    assert loaded.recommended.sampler == "tuned", said
    assert str(loaded.recommended) in said[-1]
    assert loaded.plan("tuned", loaded.recommended.steps)
    assert loaded.weights_hash == hash_before
    assert default_teacher(loaded) == CONFIG.teacher
    assert run(folder, steps=(2, 3))[:2] == [f"{steps} steps at guidance 1: tuned already" for steps in (2, 3)]
    # A table that is gone is recommended no more, and what would be without it is the teacher again.
    for file in (folder / FOLDER).glob("*.json"):
        file.unlink()
    gone = load_checkpoint(folder)
    assert (gone.recommended, default_teacher(gone)) == (None, "dpmpp_2m:50")


def test_a_run_that_was_killed_before_it_judged_the_tables_judges_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tminus.model.tuning.tune.recommend", killed)
        edit_recommended(folder, {"sampler": "euler", "steps": 4})
        with pytest.raises(KeyboardInterrupt):
            run(folder, steps=(2, 3))
    assert len(load_checkpoint(folder).tables) == 2
    *already, last = run(folder, steps=(2, 3))
    assert already == [f"{steps} steps at guidance 1: tuned already" for steps in (2, 3)]
    assert last.startswith("recommended from now on: ")


def edit_recommended(folder: Path, recommended: dict[str, Any]) -> None:
    file = folder / "tminus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recommended": recommended}))


def same(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


BAD: dict[str, tuple[Callable[[Checkpoint], Checkpoint], tuple[int, ...], float, dict[str, Any], str]] = {
    "no classes": (
        lambda checkpoint: dataclasses.replace(checkpoint, labels=Labels(("a", "b", "c", "d"), None)),
        (3,), 2.0, {}, r"guidance must be 1 \(off\), since net has no null class, got 2",
    ),
    "zero steps": (same, (0,), 1.0, {}, r"steps must be in 1\.\.50, got 0"),
    "as many as the teacher": (same, (25,), 1.0, {}, "fewer than the teacher's 25, got 25"),
    "teacher": (same, (3,), 1.0, {"teacher": "dpmpp_2m:51"}, "teacher must be .*51.*steps must"),
    "half a teacher": (same, (3,), 1.0, {"teacher": "ddim"}, "teacher must be SAMPLER:STEPS"),
    "a student": (
        lambda checkpoint: dataclasses.replace(checkpoint, student={}), (3,), 1.0, {}, "a student has its own tables",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "steps", "guidance", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_tuned_is_refused(
    folder: Path,
    change: Callable[[Checkpoint], Checkpoint],
    steps: tuple[int, ...],
    guidance: float,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(TuneError, match=message):
        check(change(load_checkpoint(folder)), steps, [guidance], dataclasses.replace(CONFIG, **settings))


def test_gradients_are_in_what_was_measured_faster_and_by_all_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, precisions = set(), []

    class Watched(Refiner):
        def __init__(self, *args: Any, precision: str, **options: Any) -> None:
            super().__init__(*args, precision=precision, **options)
            precisions.append(precision)

        def images(self, *args: Any) -> Any:
            threads.add(torch.get_num_threads())
            return super().images(*args)

    monkeypatch.setattr("tminus.model.tuning.tune.Refiner", Watched)
    monkeypatch.setattr("tminus.model.tuning.tune.faster_of", lambda *_: "bf16")
    before = torch.get_num_threads()
    run(folder, threads=3)
    assert (threads, torch.get_num_threads()) == ({3}, before)
    assert precisions == ["bf16"]
    about = json.loads((folder / FOLDER / "tuned-3.json").read_text())["about"]
    assert about["precision"] == "bf16"
