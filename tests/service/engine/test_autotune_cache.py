"""What is kept between starts, and that nothing wrong with the file matters."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tminus.model.checkpoint import Checkpoint
from tminus.model.machine import OtherPrograms
from tminus.service.engine import autotune, openvino_executor
from tminus.service.engine.autotune import (
    Choice,
    Wish,
    choose_executor,
    example_inputs,
    kept_executor,
)
from tminus.service.engine.choice_cache import GIVEN, NOISE_KEY, ChoiceCache, default_cache

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
HOLD = """
import fcntl, os, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(folder, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""
EAGER = Wish(executor="eager", precision="float32", max_batch=4)


@pytest.fixture(autouse=True)
def _no_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run beside these."""
    monkeypatch.setattr(OtherPrograms, "share", 0.0)


def test_the_answer_is_kept_and_the_second_call_measures_nothing(
    checkpoint: Checkpoint, tmp_path: Path, quick: list[int], unmeasurable: Callable[[], None]
) -> None:
    cache = tmp_path / "made" / "on the way"
    first = choose_executor(checkpoint, CPU, EAGER, cache)
    assert quick
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["executor"] == "eager"
    unmeasurable()
    second = choose_executor(checkpoint, CPU, EAGER, cache)
    assert (second.name, second.precision, second.details) == (first.name, first.precision, first.details)
    inputs = example_inputs(checkpoint, CPU, 3)
    assert second(*inputs).equal(first(*inputs))
    assert list(cache.iterdir()) == [file], "nothing else is left there"


def test_torch_takes_the_cores_that_are_free_and_keeps_their_number_with_the_answer(
    checkpoint: Checkpoint,
    tmp_path: Path,
    quick: list[int],
    unmeasurable: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where its threads compute a pass together, and wait for one another."""
    caplog.set_level("INFO")
    wish = replace(EAGER, threads=2, exact=False)

    def threads(cache: Path, **how: bool) -> int:
        torch.set_num_threads(3)
        choose_executor(checkpoint, CPU, wish, cache, **how)
        return torch.get_num_threads()

    monkeypatch.setattr("tminus.model.machine.free_cores", lambda: 1)
    assert threads(tmp_path / "shared", shares_cores=True) == 1
    assert "torch takes 1 of its 2 threads: other programs or a CPU limit leave no more" in caplog.text
    monkeypatch.setattr("tminus.model.machine.free_cores", lambda: pytest.fail("it looked"))
    assert threads(tmp_path / "asked for") == 2
    assert threads(tmp_path / "beside others", shares_cores=True, busy=True) == 2
    unmeasurable()
    assert threads(tmp_path / "shared", shares_cores=True) == 1
    torch.set_num_threads(3)
    assert kept_executor(checkpoint, CPU, wish, tmp_path / "shared") is not None
    assert torch.get_num_threads() == 1, "bits depend on it"


def test_an_answer_that_is_given_is_taken_where_there_is_no_own_also_if_it_cannot_be_written_there(
    checkpoint: Checkpoint,
    tmp_path: Path,
    quick: list[int],
    unmeasurable: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Kubernetes, where a ConfigMap has what another pod has measured, maybe while its node was busy."""
    first = choose_executor(checkpoint, CPU, EAGER, tmp_path / "of a pod")
    (file,) = (tmp_path / "of a pod").iterdir()
    given = tmp_path / "of a new pod" / GIVEN
    given.mkdir(parents=True)
    (given / file.name).write_text(json.dumps(json.loads(file.read_text()) | {NOISE_KEY: True}))
    (given / "choice-0000000000000000.json").write_text(json.dumps(GOOD))  # of another kind of node
    given.chmod(stat.S_IRUSR | stat.S_IXUSR)
    unmeasurable()
    monkeypatch.setattr(autotune, "is_idle", lambda: True)
    second = choose_executor(checkpoint, CPU, EAGER, given.parent)
    given.chmod(stat.S_IRWXU)
    assert (second.name, second.precision, second.details) == (first.name, first.precision, first.details)
    (given / file.name).unlink()
    with pytest.raises((AssertionError, ValueError)):  # it would be measured, as nothing fits
        choose_executor(checkpoint, CPU, EAGER, given.parent)


GOOD = asdict(Choice("eager", "float32", True, (1,)))
DAMAGED = {
    "cut": json.dumps(GOOD).encode()[:20],
    "binary": bytes(range(256)),
    "a list": b"[]",
    "no sizes": json.dumps({key: value for key, value in GOOD.items() if key != "sizes"}).encode(),
    "another field": json.dumps(GOOD | {"colour": "red"}).encode(),
    "deep": b"[" * 100_000,
    "an unknown executor": json.dumps(GOOD | {"executor": "toaster"}).encode(),
    "another precision": json.dumps(GOOD | {"precision": "bfloat16"}).encode(),
    **{
        f"sizes {sizes}": json.dumps(GOOD | {"sizes": sizes}).encode()
        for sizes in (5, ["one"], [0], [4, 1], [1, 1], [1, 5], [10**30], [True])
    },
    **{f"threads {count}": json.dumps(GOOD | {"threads": count}).encode() for count in (0, 1, "one")},
}


def test_a_damaged_file_is_ignored_and_mended(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Wish] = []

    def fastest(_builder: object, wish: Wish, candidates: Sequence[Choice]) -> Choice:
        measured.append(wish)
        return replace(candidates[0], sizes=(1,))

    monkeypatch.setattr(autotune, "_fastest", fastest)
    first = choose_executor(checkpoint, CPU, EAGER, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damage, content in DAMAGED.items():
        file.write_bytes(content)
        measured.clear()
        again = choose_executor(checkpoint, CPU, EAGER, tmp_path)
        assert measured, f"{damage}: it was measured again"
        assert (again.name, again.precision) == (first.name, first.precision), damage
        assert json.loads(file.read_bytes()).keys() == json.loads(whole).keys(), damage


def test_a_folder_that_cannot_be_written_is_no_error(checkpoint: Checkpoint, tmp_path: Path, quick: list[int]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert choose_executor(checkpoint, CPU, EAGER, file / "below").name == "eager", "a file is no folder"
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert choose_executor(checkpoint, CPU, EAGER, tmp_path / "new").name == "eager"
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_what_makes_another_answer_possible_has_a_file_of_its_own(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    monkeypatch.setattr(autotune, "_fastest", lambda builder, wish, candidates: replace(candidates[0], sizes=(1,)))

    def choose(checkpoint: Checkpoint = checkpoint, wish: Wish = EAGER) -> int:
        choose_executor(checkpoint, CPU, wish, tmp_path)
        return sum("executor" in json.loads(file.read_text()) for file in tmp_path.iterdir())  # and not a verdict

    assert choose() == 1
    assert choose(make_checkpoint(seed=1)) == 1, "other weights of the same network take as long"
    assert choose(make_checkpoint(block_out_channels=(8, 24))) == 2
    assert choose(make_checkpoint(sample_size=16)) == 3
    assert choose(wish=replace(EAGER, exact=False)) == 4
    assert choose(wish=replace(EAGER, max_batch=8)) == 5
    assert choose(wish=replace(EAGER, threads=2)) == 6
    assert choose(replace(checkpoint, approved={("eager", "bfloat16"): None}), replace(EAGER, precision="auto")) == 7
    assert choose(wish=replace(EAGER, precision="auto")) == 8
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert choose() == 9
    monkeypatch.setattr(openvino_executor, "version", lambda: "2099.1")
    assert choose() == 10
    monkeypatch.setattr(os, "cpu_count", lambda: 1234)
    assert choose() == 11
    monkeypatch.setattr(autotune, "CPU_SIZES", (1,))
    assert choose() == 12, "a choice from other sizes"


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tminus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "tminus"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert default_cache() is None


def test_a_choice_that_was_made_on_a_busy_machine_is_made_again_when_it_is_idle(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most calls are held up for four times their time, as by other programs."""
    monkeypatch.setattr(autotune, "TRIAL_S", 0.0)
    calls, clock, held_up_s = 0, 0.0, 0.004

    def perf_counter() -> float:
        nonlocal calls, clock
        calls += 1
        if calls % 2 == 0:  # the end of a call
            clock += 0.001 + (held_up_s if calls % 6 else 0.0)
        return clock

    def measured() -> bool:
        before = calls
        choose_executor(checkpoint, CPU, EAGER, tmp_path)
        return calls > before

    monkeypatch.setattr(autotune.time, "perf_counter", perf_counter)
    monkeypatch.setattr(autotune, "is_idle", lambda: False)
    assert measured()
    assert not measured(), "it is busy still: it would be no better"
    monkeypatch.setattr(autotune, "is_idle", lambda: True)
    assert measured()
    held_up_s = 0.0
    assert measured()
    assert not measured(), "now it is believed"


def test_a_choice_that_was_made_beside_other_programs_is_made_again_when_the_machine_is_idle(
    checkpoint: Checkpoint, tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However steady the times were: programs that compute all the time hold up each call alike."""
    share, records = 0.5, list[ChoiceCache]()
    monkeypatch.setattr(OtherPrograms, "share", property(lambda _: share))
    monkeypatch.setattr(autotune, "is_idle", lambda: True)

    def measured() -> bool:
        quick.clear()
        choose_executor(checkpoint, CPU, EAGER, tmp_path, on_record=records.append)
        return bool(quick)

    assert measured()
    share = 0.0
    assert measured()
    assert not measured(), "now it is believed"
    records[-1].mark_noisy()
    assert measured(), "a server has found that it does not fit"


def test_one_process_measures_at_a_time(checkpoint: Checkpoint, tmp_path: Path, quick: list[int]) -> None:
    """The others then find what it has measured."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(choose_executor, checkpoint, CPU, EAGER, tmp_path) for _ in range(2)]
        time.sleep(0.5)
        assert not quick, "it measures beside the other process"
        holder.communicate("\n")
        names = [each.result().name for each in both]
    assert names == ["eager", "eager"]
    once = len(quick)
    choose_executor(checkpoint, CPU, EAGER, tmp_path / "other")
    assert len(quick) == 2 * once
