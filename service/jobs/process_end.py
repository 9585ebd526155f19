"""How a process ended that said no word, and on which jobs it worked then: a file that outlives it.

The kernel keeps what a process has written when that is killed, so nothing is flushed to the disk. After a power cut,
which no job has caused, there may be nothing.
"""

import faulthandler
import fcntl
import json
import os
import re
import threading
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tminus.service.worker.loop import Part

# What the file has at which byte: the machine, the jobs of each part, and what the signal handler adds.
MACHINE_AT, PARTS_AT, SIGNAL_AT = 0, {"codes": 256, "steps": 1024}, 2**17
SUFFIX = ".end"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a process that did not take its file with it."""

    cause: str | None  # what went wrong in the process; None where it was killed from outside, as far as can be told
    jobs: frozenset[str]  # that may be the cause: what the process worked on there
    traceback: str = ""


def name_of(namespace: str | None, weights: Collection[str]) -> str:
    """Whose files a process reads: those of servers on the same store. namespace: of a shared one."""
    return "process-" + sha256("\n".join([namespace or "", *sorted(weights)]).encode()).hexdigest()[:16]


class EndFile:
    """Owns the file of this process, and the handler of the signals that end it. Each part is one thread's to write.

    A SIGSEGV and its like is told by faulthandler, which writes to the file; that the kernel has killed for want of
    memory, by its count of those.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Raises OSError where no file can be made."""
        self._file = folder / f"{name}-{uuid.uuid4().hex}{SUFFIX}"
        made = self._file.with_suffix(".new")  # not to be found before it is locked
        self._descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.pwrite(self._descriptor, json.dumps(_machine()).encode() + b"\0", MACHINE_AT)
        os.lseek(self._descriptor, SIGNAL_AT, os.SEEK_SET)
        faulthandler.enable(self._descriptor)
        made.rename(self._file)

    def work_on(self, part: Part, jobs: Collection[str]) -> None:
        """Note what the thread that calls works on from now on."""
        text = "\n".join([f"{threading.get_ident():x}", *jobs]).encode()
        room = SIGNAL_AT - PARTS_AT["steps"] if part == "steps" else PARTS_AT["steps"] - PARTS_AT["codes"]
        os.pwrite(self._descriptor, text[: room - 1] + b"\0", PARTS_AT[part])

    def close(self) -> None:
        """Take the file away: the process ends as it should."""
        faulthandler.disable()
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


def take_ends(folder: Path, name: str) -> list[End]:
    """Read, and delete, the files of processes that are there no more."""
    ends = []
    for file in sorted(folder.glob(f"{name}-*{SUFFIX}")):
        with suppress(OSError), file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
            data = opened.read()
            file.unlink()  # first: an end that is counted twice would count as two
            with suppress(ValueError, KeyError, TypeError):  # a file that was not begun
                ends.append(_end_of(data))
    return ends


def _end_of(data: bytes) -> End:
    def text_at(place: int) -> str:
        return data[place:].partition(b"\0")[0].decode(errors="replace")

    worked_on = dict[str, frozenset[str]]()  # by thread
    for place in PARTS_AT.values():
        thread, *jobs = text_at(place).split("\n")
        worked_on[thread] = frozenset(jobs)
    every_job = frozenset[str]().union(*worked_on.values())
    told = data[SIGNAL_AT:].decode(errors="replace")
    if found := re.search(r"Fatal Python error: (.+)", told):
        # Without a current thread it was one of a library's, which works for either part.
        by = re.search(r"^Current thread 0x0*([0-9a-f]+).*\n((?: .*\n)*)", told, re.MULTILINE)
        return End(found[1], worked_on.get(by[1], frozenset()) if by else every_job, by[2] if by else "")
    began, now = json.loads(text_at(MACHINE_AT)), _machine()
    if began["boot"] == now["boot"] and began["oom_kills"] < now["oom_kills"]:
        return End("the kernel killed it for want of memory", every_job)
    return End(None, every_job)


def _machine() -> dict[str, str | int]:
    """Which start of the machine this is, and how many processes it has killed for want of memory since."""
    boot, kills = "", 0
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE):
            kills = int(found[1])
    return {"boot": boot, "oom_kills": kills}
