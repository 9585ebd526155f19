"""Crash report: a file that records the jobs a process worked on and how the process died.

The next start of the server reads the file. Writes are not flushed to the disk, because the kernel keeps written data
when a process is killed. After a power cut the file may be empty, but no job causes a power cut.

A crash counts against the jobs that the process worked on (job_runner.py). Being killed from outside does not count,
unless the process had hung. A bus error does not count either: it means that a mapped file, such as the weights of a
converted network, was truncated or cannot be read.
"""

import faulthandler
import fcntl
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tminus.service.jobs.store.records import listed
from tminus.service.worker.ticks import WorkerThread

log = logging.getLogger(__name__)

# Byte offsets in the file: machine state, hang flag, current jobs of each thread, faulthandler's output.
MACHINE_AT, HANG_AT, PARTS_AT, SIGNAL_AT = 0, 192, {"codes": 256, "steps": 1024}, 2**17
HANGS = b"\1"
BYTES = SIGNAL_AT + 2**15
SUFFIX = ".end"
POLL_INTERVAL_S = 0.5  # seconds between checks for a hang
OF_MAPPED_FILE = "Bus error"  # faulthandler's name for SIGBUS
WRITE_S = 0.2  # longest wait of `work_on` for a write, so that a frozen or unreachable disk hardly delays the steps


@dataclass(frozen=True, slots=True)
class CrashReport:
    """Report left by a process that crashed or was killed. A clean shutdown deletes the file."""

    cause: str | None  # why the process failed; None if it was probably killed from outside
    jobs: frozenset[str]  # possible culprits: the failed thread's jobs, or all current jobs if the thread is unknown
    traceback: str = ""


def prefix_of(*what: str) -> str:
    """Return a prefix for crash file names. Servers with the same settings have the same prefix."""
    return "process-" + sha256("\n".join(what).encode()).hexdigest()[:16]


class CrashFile:
    """Owns the crash file of this process, and enables faulthandler to write fatal signals to the file.

    An OOM kill shows as an increase in the kernel's count of OOM kills. A separate thread writes the current jobs, so
    that a hanging disk delays the other threads by at most WRITE_S seconds.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        """Create the file. Raises OSError on failure."""
        self._file = folder / f"{prefix}-{uuid.uuid4().hex}{SUFFIX}"
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        # Another starting server may have deleted the file as a leftover before the lock was taken.
        if not os.fstat(self._descriptor).st_nlink:
            raise FileNotFoundError(f"another start has deleted {self._file}")
        os.posix_fallocate(self._descriptor, 0, BYTES)  # reserve space, because the disk may be full later
        os.pwrite(self._descriptor, json.dumps(_machine()).encode() + b"\0", MACHINE_AT)
        os.lseek(self._descriptor, SIGNAL_AT, os.SEEK_SET)
        faulthandler.enable(self._descriptor)
        self._changed = threading.Condition()
        self._unwritten: dict[int, bytes] = {}  # keyed by offset in the file
        self._worked_on: dict[WorkerThread, frozenset[str]] = {}
        self._hangs = self._closed = self._late = self._told = False
        self._stalled_s: Callable[[], float] = lambda: 0.0
        threading.Thread(target=self._write, name="tminus-crash-file", daemon=True).start()

    def watch(self, stalled_s: Callable[[], float]) -> None:
        """Start to record hangs of the process.

        stalled_s: returns how long the process has hung, in seconds, or 0. Must be thread-safe.
        """
        self._stalled_s = stalled_s

    def work_on(self, part: WorkerThread, jobs: Collection[str]) -> None:
        """Record which jobs the calling thread works on from now on. Disk errors are logged, not raised."""
        text, place = "\n".join([f"{threading.get_ident():x}", *jobs]).encode(), PARTS_AT[part]
        room = SIGNAL_AT - PARTS_AT["steps"] if part == "steps" else PARTS_AT["steps"] - PARTS_AT["codes"]
        with self._changed:
            self._worked_on[part] = frozenset(jobs)
            self._unwritten[place] = text[: room - 1] + b"\0"
            self._changed.notify_all()
            if self._late:  # an earlier write still hangs
                return
            self._late = not self._changed.wait_for(lambda: place not in self._unwritten or self._closed, WRITE_S)
            if self._late:
                self._tell(f"a write takes longer than {WRITE_S} s")

    def _write(self) -> None:
        while True:
            self._check_hang()
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closed, POLL_INTERVAL_S)
                if self._closed:
                    return
                if not self._unwritten:
                    continue
                place, text = next(iter(self._unwritten.items()))
            try:
                os.pwrite(self._descriptor, text, place)
            except OSError as error:
                self._tell(error)
            with self._changed:
                self._late = False
                if self._unwritten.get(place) is text:  # otherwise newer text has replaced this text
                    del self._unwritten[place]
                    self._changed.notify_all()

    def _check_hang(self) -> None:
        if self._hangs == (hangs := self._stalled_s() > 0):
            return
        with self._changed:
            self._hangs, self._unwritten[HANG_AT] = hangs, HANGS if hangs else b"\0"
            jobs = listed(sorted(self._jobs)) or "no durable job"
        log.error("the server hangs as it works on %s" if hangs else "the server that hung goes on with %s", jobs)

    @property
    def _jobs(self) -> frozenset[str]:
        return frozenset[str]().union(*self._worked_on.values())

    def _tell(self, reason: object) -> None:
        if not self._told:
            self._told = True
            log.warning("if a job ends this process, another may be taken for it: %s: %s", self._file, reason)

    def close(self) -> frozenset[str]:
        """Delete the file at a clean shutdown.

        Return the current jobs if the process hangs, else an empty set. The caller counts a crash against the returned
        jobs. The file descriptor stays open, because a hanging thread may still use it.
        """
        faulthandler.disable()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            jobs = self._jobs if self._stalled_s() else frozenset[str]()
        self._file.unlink(missing_ok=True)
        return jobs


def take_crash_reports(folder: Path, prefix: str) -> list[CrashReport]:
    """Read and delete the files of processes that no longer run."""
    reports = []
    for file in sorted(folder.glob(f"{prefix}-*{SUFFIX}")):
        with suppress(OSError), file.open("r+b") as opened:  # on NFS, only a file opened for writing can be locked
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError if the process is alive
            data = opened.read()
            file.unlink()  # before parsing, so that no crash is counted twice
            with suppress(ValueError, KeyError, TypeError):  # the process may have died before its first write
                reports.append(_parse_report(data))
    return reports


def log_crash_reports(reports: Sequence[CrashReport]) -> None:
    """Log how each earlier process ended."""
    for report in reports:
        jobs = listed(sorted(report.jobs)) or "no durable job"
        if report.cause is None:
            log.info("a server before this one was killed, or the machine went, as it worked on %s", jobs)
            continue
        log.error(
            "a server before this one has failed: %s. It worked on %s%s",
            report.cause, jobs, f"\n{report.traceback.rstrip()}" if report.traceback else "",
        )  # fmt: skip


def _parse_report(data: bytes) -> CrashReport:
    def text_at(place: int) -> str:
        return data[place:].partition(b"\0")[0].decode(errors="replace")

    worked_on = dict[str, frozenset[str]]()  # by thread id
    for place in PARTS_AT.values():
        thread, *jobs = text_at(place).split("\n")
        worked_on[thread] = frozenset(jobs)
    every_job = frozenset[str]().union(*worked_on.values())
    if data[HANG_AT:].startswith(HANGS):  # the hang is the cause, even if a signal or a kill ended the process
        return CrashReport("it hung", every_job)
    of_signal = data[SIGNAL_AT:].decode(errors="replace")
    if found := re.search(r"Fatal Python error: (.+)", of_signal):
        # If no current thread is named, a library's own thread got the signal. It may have worked for either worker
        # thread.
        by = re.search(r"^Current thread 0x0*([0-9a-f]+).*\n((?: .*\n)*)", of_signal, re.MULTILINE)
        return CrashReport(found[1], worked_on.get(by[1], frozenset()) if by else every_job, by[2] if by else "")
    began, now = json.loads(text_at(MACHINE_AT)), _machine()
    if began["boot"] == now["boot"] and began["oom_kills"] < now["oom_kills"]:
        return CrashReport("the kernel killed it for want of memory", every_job)
    return CrashReport(None, every_job)


def _machine() -> dict[str, str | int]:
    """Return the machine's boot id, and the number of OOM kills since boot."""
    boot, kills = "", 0
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE):
            kills = int(found[1])
    return {"boot": boot, "oom_kills": kills}
