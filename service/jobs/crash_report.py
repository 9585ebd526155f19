"""The crash report: a file that shows the next start how a process died, and on which jobs it worked.

The file outlives the process: the kernel keeps what was written when the process is killed, so nothing is flushed to
the disk. After a power cut, which no job has caused, the file may be empty.

A crash counts against the jobs that the process worked on (job_runner.py). Two causes do not count: a kill from
outside, unless the process hung; and a bus error, since it means that a mapped file (such as a converted network's)
was cut or cannot be read.
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

# Byte offsets in the file: the machine, whether the process hangs, the jobs of each thread, and faulthandler's output.
MACHINE_AT, HANG_AT, PARTS_AT, SIGNAL_AT = 0, 192, {"codes": 256, "steps": 1024}, 2**17
HANGS = b"\1"
BYTES = SIGNAL_AT + 2**15
SUFFIX = ".end"
POLL_INTERVAL_S = 0.5  # between two checks whether the process hangs
OF_MAPPED_FILE = "Bus error"  # faulthandler's name of SIGBUS
WRITE_S = 0.2  # a longer write is not waited for: a folder that is frozen or away must not stop the steps


@dataclass(frozen=True, slots=True)
class CrashReport:
    """Report left by a process that crashed or was killed. A clean shutdown deletes the file."""

    cause: str | None  # the failure of the process; None if it was, by all signs, killed from outside
    jobs: frozenset[str]  # jobs that may be the cause: jobs of the thread that failed, or all current jobs
    traceback: str = ""


def prefix_of(*what: str) -> str:
    """Return the prefix of a server's file names. Servers with the same settings have the same prefix."""
    return "process-" + sha256("\n".join(what).encode()).hexdigest()[:16]


class CrashFile:
    """Owns the file of this process, and the handler of the signals that end it.

    faulthandler writes a fatal signal into the file. An OOM kill is recognised by the kernel's count of such kills. A
    separate thread writes the current jobs, so that a disk that hangs stops no other thread.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        """Create the file. Raises OSError if that fails."""
        self._file = folder / f"{prefix}-{uuid.uuid4().hex}{SUFFIX}"
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        # Another start took the file for a leftover and deleted it before the lock.
        if not os.fstat(self._descriptor).st_nlink:
            raise FileNotFoundError(f"another start has deleted {self._file}")
        os.posix_fallocate(self._descriptor, 0, BYTES)  # reserves the space: the disk may be full later
        os.pwrite(self._descriptor, json.dumps(_machine()).encode() + b"\0", MACHINE_AT)
        os.lseek(self._descriptor, SIGNAL_AT, os.SEEK_SET)
        faulthandler.enable(self._descriptor)
        self._changed = threading.Condition()
        self._unwritten: dict[int, bytes] = {}  # by offset in the file
        self._worked_on: dict[WorkerThread, frozenset[str]] = {}
        self._hangs = self._closed = self._late = self._told = False
        self._stalled_s: Callable[[], float] = lambda: 0.0
        threading.Thread(target=self._write, name="tminus-crash-file", daemon=True).start()

    def watch(self, stalled_s: Callable[[], float]) -> None:
        """Record from now on whether the process hangs. stalled_s: seconds that it has hung, or 0; thread-safe."""
        self._stalled_s = stalled_s

    def work_on(self, part: WorkerThread, jobs: Collection[str]) -> None:
        """Record the jobs that the calling thread works on from now on. Does not raise if the disk fails."""
        text, place = "\n".join([f"{threading.get_ident():x}", *jobs]).encode(), PARTS_AT[part]
        room = SIGNAL_AT - PARTS_AT["steps"] if part == "steps" else PARTS_AT["steps"] - PARTS_AT["codes"]
        with self._changed:
            self._worked_on[part] = frozenset(jobs)
            self._unwritten[place] = text[: room - 1] + b"\0"
            self._changed.notify_all()
            if self._late:  # the disk still hangs
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
                if self._unwritten.get(place) is text:  # else a newer text replaced it while the disk hung
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
        """Delete the file for a clean shutdown. Return the jobs to count a crash against: none unless the process
        hangs.

        The file's descriptor stays open, since a thread that hangs may use it.
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
        with suppress(OSError), file.open("r+b") as opened:  # NFS locks only files that are opened for writing
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
            data = opened.read()
            file.unlink()  # before parsing: a crash must not be counted twice
            with suppress(ValueError, KeyError, TypeError):  # the process died before it wrote anything
                reports.append(_parse_report(data))
    return reports


def log_crash_reports(reports: Sequence[CrashReport]) -> None:
    """Log how earlier processes ended."""
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

    worked_on = dict[str, frozenset[str]]()  # by thread
    for place in PARTS_AT.values():
        thread, *jobs = text_at(place).split("\n")
        worked_on[thread] = frozenset(jobs)
    every_job = frozenset[str]().union(*worked_on.values())
    if data[HANG_AT:].startswith(HANGS):  # a hang comes first, whatever ended the process afterwards
        return CrashReport("it hung", every_job)
    of_signal = data[SIGNAL_AT:].decode(errors="replace")
    if found := re.search(r"Fatal Python error: (.+)", of_signal):
        # Without a current thread, the signal hit a library's thread, which may work for either part.
        by = re.search(r"^Current thread 0x0*([0-9a-f]+).*\n((?: .*\n)*)", of_signal, re.MULTILINE)
        return CrashReport(found[1], worked_on.get(by[1], frozenset()) if by else every_job, by[2] if by else "")
    began, now = json.loads(text_at(MACHINE_AT)), _machine()
    if began["boot"] == now["boot"] and began["oom_kills"] < now["oom_kills"]:
        return CrashReport("the kernel killed it for want of memory", every_job)
    return CrashReport(None, every_job)


def _machine() -> dict[str, str | int]:
    """Return the machine's boot id, and the number of OOM kills since that boot."""
    boot, kills = "", 0
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE):
            kills = int(found[1])
    return {"boot": boot, "oom_kills": kills}
