"""What work has come lately, so that an ETA can count on more of it. Pure: no torch, no clock, no lock.

Under the shortest-first policy a job is overtaken by every later one that is shorter than what it has left. If such
work takes a share of the machine, the job takes 1 / (1 - share) times as long: the busy period of a queue with
priorities (Kleinrock 1976, vol. 2, sec. 3.3).
"""

from bisect import bisect_left
from collections import deque
from itertools import accumulate
from statistics import median

WINDOW_S = 10.0
WINDOWS = 6  # the median of so many counts: a burst is one of them, and does not go on
MOST_SHARE = 0.9  # beyond it, nothing can be foreseen


class Arrivals:
    """Owns the sizes of the jobs that were accepted in the last minute, in seconds of full ticks."""

    def __init__(self) -> None:
        self._current, self._sizes = 0, list[float]()  # of the window that runs: its number, and the sizes in it
        # Of each window that is over: its number, the sizes in order, and the sum of the first so many of them.
        self._over: deque[tuple[int, list[float], list[float]]] = deque(maxlen=WINDOWS)

    def add(self, work_s: float, now_s: float) -> None:
        """Note a job of so much work."""
        self._go_on_to(now_s)
        self._sizes.append(work_s)

    def are_over(self, now_s: float) -> bool:
        """Whether none of them counts any more."""
        self._go_on_to(now_s)
        return not self._sizes and all(number < self._current - WINDOWS for number, *_ in self._over)

    def stretch(self, left_s: float, now_s: float, least_share: float) -> float:
        """How many times as long a job with so much work left takes, as shorter ones come.

        least_share: of the machine, that it gets in any case. The window that is not over yet does not count.
        """
        self._go_on_to(now_s)
        shorter = [0.0] * WINDOWS
        for number, sizes, sums in self._over:
            if number >= self._current - WINDOWS:
                shorter[number - self._current] = sums[bisect_left(sizes, left_s)]
        share = median(shorter) / WINDOW_S
        return 1 / max(1 - min(share, MOST_SHARE), least_share)

    def _go_on_to(self, now_s: float) -> None:
        current = int(now_s // WINDOW_S)
        if current > self._current:
            sizes = sorted(self._sizes)
            self._over.append((self._current, sizes, [0.0, *accumulate(sizes)]))
            self._current, self._sizes = current, []
