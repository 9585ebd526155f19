"""Whether the worker takes jobs: warming up, ready, draining, hanging, closed or crashed. Any thread may ask."""

from collections.abc import Sequence
from threading import Event, Thread

from tminus.service.errors import Draining, EngineFailed, NotReady, Stalled
from tminus.service.threads import Pulse

CRASHED = "the worker has stopped; the server's log says why"


class WorkerState:
    """Owns the flags of a worker; its threads set them."""

    def __init__(self, thread: Thread, own: Sequence[Pulse], others: Sequence[Pulse]) -> None:
        """own: pulses of the worker's threads. others: those of other threads; no job is taken while one hangs."""
        self._thread, self._own, self._others = thread, own, others
        self.is_warm, self.is_draining, self.is_closed = Event(), Event(), Event()
        self.crashed = False  # whether the thread ended by an error of its own
        self.jobs_of_the_crash = frozenset[str]()  # jobs that were being worked on then
        self.coding_hangs = False  # whether the coding thread still ran when it was closed

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over and jobs are accepted."""
        return self.is_warm.is_set() and self.alive and not self.draining and self.stall is None

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the worker is ending."""
        return self.is_draining.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self.is_closed.is_set()

    @property
    def hangs(self) -> bool:
        """Whether the worker was closed and a thread of it still runs."""
        return self.is_closed.is_set() and (self._thread.is_alive() or self.coding_hangs)

    @property
    def stall(self) -> Stalled | None:
        """The longest hang, as the error by which jobs are refused; None while nothing hangs."""
        stalled_s, name = max((pulse.stalled_s, pulse.name) for pulse in (*self._own, *self._others))
        return Stalled(stalled_s, name) if stalled_s else None

    @property
    def stalled_s(self) -> float:
        """How long a step, a command or an image of an autoencoder has hung; 0.0 while none does."""
        return max(pulse.stalled_s for pulse in self._own)

    def check_open(self) -> None:
        """Raise what a job would be refused with now: NotReady, Draining, Stalled or EngineFailed."""
        if self.crashed:
            raise EngineFailed(CRASHED)
        if self.draining or self.is_closed.is_set():
            raise Draining
        if not self.is_warm.is_set():
            raise NotReady
        if stall := self.stall:
            raise stall
