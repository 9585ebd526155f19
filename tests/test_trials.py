"""The trials of tests/trials, small: each must pass, and must notice what it is there to notice."""

import random
from pathlib import Path

import pytest

from tests.trials import checkpoints, websockets


@pytest.fixture(autouse=True)
def _no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process of the tests, where a trial is in a child of its own."""
    monkeypatch.setattr(checkpoints.signal, "alarm", lambda _seconds: 0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("safe", "pickled"):
        checkpoints.make(folder / name, safe=name == "safe")
    return [folder / "safe", folder / "pickled"]


@pytest.mark.slow
def test_no_damaged_folder_does_anything_but_be_refused_or_be_a_checkpoint(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HANG_S", 60)
    outcomes = [checkpoints.attempt(number, 0, sources, tmp_path) for number in range(60)]
    assert {outcome for outcome, _ in outcomes} == {"refused", "loaded"}, outcomes
    assert len({done for _, done in outcomes}) > 20


def test_every_way_of_damage_changes_a_folder(sources: list[Path], tmp_path: Path) -> None:
    """And none of them leaves it as it was in most cases, or nothing would be tried."""
    for number, mutate in enumerate(checkpoints.MUTATIONS):
        folder = tmp_path / str(number)
        checkpoints.shutil.copytree(sources[number % 2], folder)
        before = {path: path.read_bytes() for path in checkpoints.files_of(folder)}
        assert mutate(folder, random.Random(number))
        after = {path: path.read_bytes() for path in checkpoints.files_of(folder) if not path.is_symlink()}
        assert after != before, mutate


def test_code_that_ran_would_be_noticed(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda folder: (folder.parent / "canary").touch())
    assert checkpoints.attempt(0, 0, sources, tmp_path)[0] == "ran code"


@pytest.mark.slow
def test_no_hostile_dialogue_leaves_anything_behind() -> None:
    counts, wrong = websockets.trial(150, 3)
    assert wrong == []
    assert counts["dialogues"] == 150
    assert counts["HTTP 101"] > 75
    assert counts.keys() >= {"malformed_message", "unauthorized", "malformed_request"}
