"""Look for damage in the write-ahead log that a killed server has left. SQLite ignores all from a bad frame on.

A crash can tear only the transaction that was being written, the last one. Where more transactions follow a frame that
does not verify, the file was damaged, and jobs that had been accepted would be lost without a word. A log that ends
inside a frame was torn by a crash, or cut by something else, and nothing in it tells which.
Format: sqlite.org/fileformat.html, section 4.
"""

import re
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

HEADER, FRAME = 32, 24
MAGIC = 0x377F0682  # with the lowest bit set, checksums are of big-endian words
MASK = 0xFFFFFFFF
JOB_ID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class Damage:
    """The header or the first frame that does not verify, and what follows it."""

    offset: int  # of the end of what is sound, in bytes
    transactions: int
    job_ids: tuple[str, ...]  # that are named in what follows


@dataclass(frozen=True, slots=True)
class Cut:
    """All frames verify, and the log ends inside one."""

    ignored_bytes: int  # from the last commit on


def find_damage(wal: Path) -> Damage | Cut | None:
    """Check each frame; None where there is no damage beyond a torn last transaction. Raises OSError."""
    data = wal.read_bytes()
    if len(data) < HEADER:
        return None
    magic, _, page_size, _, *salts_and_sums = struct.unpack(">8I", data[:HEADER])
    salts, sums, big_endian = data[16:24], (salts_and_sums[2], salts_and_sums[3]), bool(magic & 1)
    if magic & ~1 != MAGIC or _checksum(data[:24], (0, 0), big_endian) != sums:
        return _below_bad_header(data)
    size = FRAME + page_size
    sound = HEADER  # the end of the last sound transaction
    for at in range(HEADER, len(data) - size + 1, size):
        frame = data[at : at + FRAME]
        sums = _checksum(frame[:8], sums, big_endian)
        sums = _checksum(data[at + FRAME : at + size], sums, big_endian)
        # Of other salts is what an earlier log has left; but then no later frame has those of this one.
        if frame[8:16] != salts or struct.unpack(">2I", frame[16:24]) != sums:
            return _after(data, at, size, salts, sound)
        if frame[4:8] != bytes(4):  # a commit
            sound = at + size
    return Cut(len(data) - sound) if (len(data) - HEADER) % size else None


def _below_bad_header(data: bytes) -> Damage | None:
    """What SQLite ignores, as the header does not verify: the frames verify among themselves, if there was a log.

    What the header says of them is not to be trusted, so each size of a page is tried, and each order of bytes.
    """
    for size in (FRAME + 2**exponent for exponent in range(9, 17)):
        if any(_commits_in_chain(data, size, big_endian) >= 2 for big_endian in (False, True)):
            return _after(data, HEADER, size, data[HEADER + 8 : HEADER + 16], 0)
    return None


def _commits_in_chain(data: bytes, size: int, big_endian: bool) -> int:
    """How many frames behind the first are commits, until one does not follow from the checksum of the one before."""
    commits = 0
    for at in range(HEADER + size, len(data) - size + 1, size):
        before, frame = data[at - size : at], data[at : at + size]
        sums = _checksum(frame[:8], struct.unpack(">2I", before[16:FRAME]), big_endian)
        sums = _checksum(frame[FRAME:], sums, big_endian)
        if frame[8:16] != before[8:16] or struct.unpack(">2I", frame[16:FRAME]) != sums:
            break
        commits += frame[4:8] != bytes(4)
    return commits


def _after(data: bytes, bad: int, size: int, salts: bytes, sound: int) -> Damage | None:
    """What follows a frame that does not verify, in the same log."""
    later = [at for at in range(bad, len(data) - size + 1, size) if data[at + 8 : at + 16] == salts]
    commits = sum(data[at + 4 : at + 8] != bytes(4) for at in later)
    if commits < 2:  # the last transaction was torn
        return None
    found = (JOB_ID.findall(data[at : at + size]) for at in later)
    return Damage(sound, commits, tuple(sorted({name.decode() for names in found for name in names})))


def _checksum(data: bytes, sums: tuple[int, int], big_endian: bool) -> tuple[int, int]:
    words = array("I", data)
    assert words.itemsize == 4
    if big_endian != (struct.pack("=I", 1) == struct.pack(">I", 1)):
        words.byteswap()
    one, two = sums
    pairs = iter(words)
    for first, second in zip(pairs, pairs, strict=True):
        one = (one + first + two) & MASK
        two = (two + second + one) & MASK
    return one, two
