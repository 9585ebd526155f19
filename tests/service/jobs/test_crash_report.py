import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.service.fakes import wait_until
from tests.service.jobs.conftest import FileShelf
from tests.service.jobs.kept import job
from tminus.service.jobs import crash_report
from tminus.service.jobs.crash_report import (
    CrashFile,
    CrashReport,
    log_crash_reports,
    take_crash_reports,
)
from tminus.service.jobs.store.async_store import Stores

# A process with two threads, each of which works on something; then one of them dies, or all do.
SCRIPT = """
import ctypes, mmap, sys, tempfile, threading
from pathlib import Path
from tminus.service.jobs.crash_report import CrashFile

file, dies, done = CrashFile(Path(sys.argv[1]), "server"), sys.argv[2], threading.Barrier(3)

def work(part, jobs):
    file.work_on(part, [f"a longer list than that of {part}"] * 9)
    file.work_on(part, jobs)
    done.wait()
    if dies == part:
        ctypes.string_at(0)
    if dies == f"mapped {part}":
        with tempfile.TemporaryFile() as cut:
            cut.truncate(mmap.PAGESIZE)
            pages = mmap.mmap(cut.fileno(), 0)
            cut.truncate(0)
            pages[0]
    threading.Event().wait()

threading.Thread(target=work, args=("steps", ["a", "b"]), daemon=True).start()
threading.Thread(target=work, args=("codes", ["c"]), daemon=True).start()
done.wait()
if dies == "main":
    ctypes.string_at(0)
print("ready", flush=True)
sys.stdin.read()
if dies == "none":
    file.close()
"""


def start(folder: Path, dies: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT, str(folder), dies]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("dies", "jobs"), [("steps", {"a", "b"}), ("codes", {"c"}), ("main", set())])
def test_the_thread_that_a_signal_ends_tells_which_jobs_may_be_the_cause(
    tmp_path: Path, dies: str, jobs: set[str]
) -> None:
    with start(tmp_path, dies) as process:
        assert process.wait(60) == -signal.SIGSEGV
    (end,) = take_crash_reports(tmp_path, "server")
    assert (end.cause, end.jobs) == ("Segmentation fault", jobs)
    assert "string_at" in end.traceback
    assert take_crash_reports(tmp_path, "server") == [], "it is told once"


@pytest.mark.parametrize("oom_kills", [0, 1])
def test_a_process_that_is_killed_is_the_cause_only_where_the_kernel_lacked_memory(
    tmp_path: Path, oom_kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(tmp_path, "killed") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert take_crash_reports(tmp_path, "server") == [], "it lives"
        process.kill()
        process.wait(60)
    machine = crash_report._machine()
    now = machine | {"oom_kills": int(machine["oom_kills"]) + oom_kills}
    monkeypatch.setattr(crash_report, "_machine", lambda: now)
    assert take_crash_reports(tmp_path, "another server") == []
    (end,) = take_crash_reports(tmp_path, "server")
    assert (end.cause is not None, end.jobs) == (oom_kills > 0, {"a", "b", "c"})


HANGS = """
import sys
from pathlib import Path
from tminus.service.jobs.crash_report import CrashFile

stalled_s, file = 0.0, CrashFile(Path(sys.argv[1]), "server")
file.watch(lambda: stalled_s)
file.work_on("steps", ["a", "b"])
for line in sys.stdin:
    stalled_s = float(line)
"""


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_process_that_is_killed_while_it_hangs_is_the_cause(tmp_path: Path, goes_on: bool) -> None:
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("61\n")
        process.stdin.flush()
        assert process.stderr.readline() == "the server hangs as it works on a, b\n"
        (path,) = tmp_path.iterdir()
        wait_until(lambda: path.read_bytes()[crash_report.HANG_AT] == 1)
        if goes_on:
            process.stdin.write("0\n")
            process.stdin.flush()
            wait_until(lambda: path.read_bytes()[crash_report.HANG_AT] == 0)
        process.kill()
        process.wait(60)
    (end,) = take_crash_reports(tmp_path, "server")
    assert (end.cause, end.jobs) == (None if goes_on else "it hung", {"a", "b"})


def test_a_process_that_ends_as_it_should_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path, "none") as process:
        process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_or_of_something_else_tells_nothing(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"\0" * 100, b"{}", b"\xff" * 200_000)):
        (tmp_path / f"server-{number}.end").write_bytes(data)
    assert take_crash_reports(tmp_path, "server") == []
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys, signal
from pathlib import Path
from tminus.service.jobs.crash_report import CrashFile

file = CrashFile(Path(sys.argv[1]), "server")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for job in "abc":
    file.work_on("steps", [job])
file.close()
print("still here")
"""


def test_a_disk_that_keeps_nothing_stops_no_thread_and_is_told_of_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "still here\n"
    assert done.stderr.count("another may be taken for it") == 1
    assert "File too large" in done.stderr


def test_a_disk_that_hangs_stops_no_thread_and_has_the_newest_jobs_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed, write = threading.Event(), os.pwrite

    def pwrite(descriptor: int, data: bytes, at: int) -> int:
        thawed.wait()
        time.sleep(0.02)  # what is not waited for is not there at once
        return write(descriptor, data, at)

    crash_file = CrashFile(tmp_path, "server")
    (path,) = tmp_path.iterdir()
    try:
        monkeypatch.setattr(os, "pwrite", pwrite)
        for job in "abc":
            crash_file.work_on("steps", [job])
        assert b"\na\0" not in path.read_bytes()
        thawed.set()
        wait_until(lambda: b"\nc\0" in path.read_bytes())

        def is_waited_for(job: str) -> bool:
            crash_file.work_on("steps", [job])
            return f"\n{job}\0".encode() in path.read_bytes()

        wait_until(lambda: is_waited_for("d"))
        assert is_waited_for("e")
    finally:
        thawed.set()
        crash_file.close()
        faulthandler.enable()


SIGNAL = "Segmentation fault"


def crashes_counted(file: FileShelf, reports: Sequence[CrashReport]) -> list[int]:
    """Open the file as a start does that found these reports."""
    stores = Stores(lambda _weights: file.open(), crash_reports=reports)
    stores.take_first("ab")
    stores.close()
    return [record.crashes for record in file.open().claim_all().jobs]


def test_an_end_counts_against_what_was_worked_on_and_being_killed_from_outside_does_not(
    file: FileShelf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = file.open()
    for name in "abc":
        store.add(job(name))
    store.close()
    killed = [CrashReport(None, frozenset("a"))] * 50
    ends = [*killed, CrashReport(SIGNAL, frozenset("bc"), "  File x"), CrashReport(SIGNAL, frozenset())]
    log_crash_reports(ends)
    assert crashes_counted(file, ends) == [0, 1, 1]
    assert "killed, or the machine went, as it worked on a\n" in caplog.text
    assert f"{SIGNAL}. It worked on b, c\n  File x\n" in caplog.text
    assert f"{SIGNAL}. It worked on no durable job\n" in caplog.text


def test_a_mapped_file_that_was_cut_is_no_jobs_doing(
    file: FileShelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the weights of a converted network are that another program writes over."""
    store = file.open()
    for name in "ab":
        store.add(job(name))
    store.close()
    with start(tmp_path, "mapped steps") as process:
        assert process.wait(60) == -signal.SIGBUS
    ends = take_crash_reports(tmp_path, "server")
    log_crash_reports(ends)
    assert "has failed: Bus error. It worked on a, b\n" in caplog.text
    assert crashes_counted(file, ends) == [0, 0]
