"""How long a call goes on trying. No I/O but a clock."""

import random
import time
from collections.abc import Callable

from service.client.effects import Answer, Ask, Call, Pause, Request
from service.client.errors import ClientError, Problem, Unreachable, error_of

RESTART_S = 60.0  # a server that was there and is gone may be about to come back
FIRST_S, LONGEST_S = 0.25, 4.0  # between two tries to connect
WORTH_WAITING = (429, 503)


class Patience:
    """The patience of one call: asked after each failure, it says how long to wait, or raises.

    patience_s: how long in all, from the first failure on; no call does harm twice, so a connection that broke is no
    end. durable: what is asked for outlasts the server's process, so that a restart is waited for; known: that there is
    a server is known, so that this may be one.
    """

    def __init__(
        self,
        patience_s: float,
        *,
        durable: bool = False,
        known: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience_s, self._durable, self._clock = patience_s, durable, clock
        self.first_s = FIRST_S
        self._known = known
        self.renew()

    def renew(self) -> None:
        """Begin anew: there was progress."""
        self._began: float | None = None
        self._next_s = self.first_s

    def pause_s(self, error: ClientError) -> float:
        """Seconds until the next try. Raises the error where no try is left."""
        limit_s, now_s = self._patience_s, self._clock()
        self._began = now_s if self._began is None else self._began
        if isinstance(error, Problem) and error.status in WORTH_WAITING and error.retry_after_s is not None:
            wait_s = error.retry_after_s  # the server keeps room for who comes back then
        elif isinstance(error, Unreachable):
            self._known |= error.reached
            wait_s = self._next_s * random.uniform(0.75, 1)  # noqa: S311  a herd is to spread out
            self._next_s = min(2 * self._next_s, LONGEST_S)
            if self._durable and self._known:
                limit_s = max(limit_s, RESTART_S)
        else:
            raise error
        if now_s - self._began + wait_s > limit_s:
            raise error
        return wait_s


def persist(request: Request, patience: Patience) -> Call[Answer]:
    """Ask until there is an answer of 2xx. Raises ClientError."""
    while True:
        try:
            answer: Answer = yield Ask(request)
            check(answer)
        except ClientError as error:
            pause_s = patience.pause_s(error)
        else:
            return answer
        yield Pause(pause_s)


def check(answer: Answer) -> None:
    """Raise the ClientError that an answer stands for, unless it is a good one."""
    if not 200 <= answer.status < 300:
        raise error_of(answer.status, answer.headers, answer.content)
