"""How much a peer has done: a small file that each of its model processes maps, and that the benchmark reads.

No request of ours stands in the peer's queue for it, and a pass that is half way through a request counts.
"""

import mmap
import os
import struct
from pathlib import Path

LAYOUT = struct.Struct("<2d")  # row-steps, forward passes


class Tally:
    """One process's count, in a file named for the process. Its one thread that runs the model adds."""

    def __init__(self, folder: Path) -> None:
        path = folder / str(os.getpid())
        path.write_bytes(LAYOUT.pack(0, 0))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), LAYOUT.size)
        self._row_steps = self._passes = 0

    def add(self, rows: int) -> None:
        """Count a forward pass of so many rows."""
        self._row_steps += rows
        self._passes += 1
        LAYOUT.pack_into(self._map, 0, self._row_steps, self._passes)


def read_tally(folder: Path) -> tuple[float, float]:
    """Sum the row-steps and the forward passes of all processes."""
    counts = [LAYOUT.unpack(path.read_bytes()) for path in folder.iterdir()]
    return sum(row_steps for row_steps, _ in counts), sum(passes for _, passes in counts)
