"""Fair turns at a resource that serves one request at a time.

The next turn goes to the caller that has used the resource for the least time. A caller gains nothing by being idle.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Turn:
    caller: str
    expected_s: float
    has_come: asyncio.Event = field(default_factory=asyncio.Event)
    began_s: float = 0.0


class CallerTurns:
    """A lock that callers take in fair turns. Use it only in the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._current: _Turn | None = None
        self._waiting: list[_Turn] = []  # in order of arrival
        self._used_s: dict[str, float] = {}  # seconds used, keyed by caller; cleared when no turn runs or waits

    @asynccontextmanager
    async def taken(self, caller: str, expected_s: float = 0.0) -> AsyncIterator[None]:
        """Wait for a turn, and hold it during the `with` block.

        expected_s: how long the block will probably take, which `wait_s` uses.
        """
        turn = _Turn(caller, expected_s)
        self._used_s[caller] = self._used_by(caller)
        self._waiting.append(turn)
        self._begin_next()
        try:
            await turn.has_come.wait()
            yield
        finally:
            if turn is self._current:
                self._used_s[caller] += self._clock() - turn.began_s
                self._current = None
                self._begin_next()
            else:
                self._waiting.remove(turn)

    def wait_s(self, caller: str) -> float:
        """Predict how many seconds a caller would wait for a new turn."""
        used_s, wait_s = {**self._used_s, caller: self._used_by(caller)}, 0.0
        if self._current is not None:
            wait_s = self._current.expected_s
            used_s[self._current.caller] += wait_s
        until_s = used_s[caller] + sum(turn.expected_s for turn in self._waiting if turn.caller == caller)
        for turn in self._waiting:
            if used_s[turn.caller] <= until_s:
                wait_s += turn.expected_s
                used_s[turn.caller] += turn.expected_s
        return wait_s

    def _used_by(self, caller: str) -> float:
        active = {turn.caller for turn in (self._current, *self._waiting) if turn is not None}
        return max(self._used_s.get(caller, 0.0), min((self._used_s[each] for each in active), default=0.0))

    def _begin_next(self) -> None:
        if self._current is not None:
            return
        if not self._waiting:
            self._used_s.clear()
            return
        self._current = turn = min(self._waiting, key=lambda turn: self._used_s[turn.caller])  # ties: first come
        self._waiting.remove(turn)
        turn.began_s = self._clock()
        turn.has_come.set()
