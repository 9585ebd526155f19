"""The state of the worker: warming up, ready, draining, hanging, closed or crashed. Any thread may read it."""

from collections.abc import Sequence
from threading import Event, Thread

from tminus.service.errors import Draining, EngineFailed, NotReady, Stalled
from tminus.service.threads import Pulse

CRASHED = "the worker has stopped; the server's log says why"


class WorkerState:
    """Owns the flags of a worker; its threads set them."""

    def __init__(self, thread: Thread, own: Sequence[Pulse], others: Sequence[Pulse]) -> None:
        """own: pulses of the worker's threads. others: of other threads; no job is taken while one of them hangs."""
        self._thread, self._own, self._others = thread, own, others
        self.is_warm, self.is_draining, self.is_closed = Event(), Event(), Event()
        self.crashed = False  # whether an error ended the thread
        self.jobs_of_the_crash = frozenset[str]()  # jobs that may have caused it
        self.autoencoder_hangs = False  # whether the autoencoder's thread still ran after it was closed

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
        return self.is_closed.is_set() and (self._thread.is_alive() or self.autoencoder_hangs)

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
        """Raise the error that would refuse a job now: NotReady, Draining, Stalled or EngineFailed."""
        if self.crashed:
            raise EngineFailed(CRASHED)
        if self.draining or self.is_closed.is_set():
            raise Draining
        if not self.is_warm.is_set():
            raise NotReady
        if stall := self.stall:
            raise stall
