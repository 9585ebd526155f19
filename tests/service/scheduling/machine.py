"""The schedulers of some models with a clock of predicted ticks, for the tests of scheduling."""

from collections import Counter, deque
from collections.abc import Mapping
from itertools import count

from tminus.service.scheduling.forecast import Pending, Speed, forecast
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.scheduler import BatchPolicy, ModelScheduler, Scheduler, TickTimes, Turn
from tminus.service.work import Batch, Outlook, Work

TIMES = TickTimes(((1, 0.003), (2, 0.0033), (4, 0.005), (8, 0.009), (16, 0.017)))


def plain(rows: int, steps: int, model: int = 0) -> Work:
    return Work(rows, steps, range(0), model=model)


def guided(rows: int, steps: int) -> Work:
    return Work(rows, steps, range(steps))


def speed_of(max_batch: int = 8, short_batch: int | None = None, times: TickTimes = TIMES) -> Speed:
    return Speed(BatchPolicy.of(max_batch, short_batch, times), 1000)


class Machine:
    """Jobs are called by their owner and a number."""

    def __init__(self, *speeds: Speed) -> None:
        self.speeds: Mapping[int, Speed] = dict(enumerate(speeds))
        arrivals, self.times = count(), OwnerTimes()
        self.schedulers = {model: Scheduler(speed.policy, arrivals, self.times) for model, speed in self.speeds.items()}
        self.turns = ModelScheduler[int]()
        for model, scheduler in self.schedulers.items():
            self.turns.put(model, scheduler)
        self.now_s, self._rows = 0.0, count()
        self.in_flight: deque[tuple[Turn[int], Batch, float]] = deque()  # with what each takes
        self.works: dict[str, Work] = {}
        self.left: dict[str, int] = {}  # places, by job
        self.ends: dict[str, float] = {}
        self.places: Counter[str] = Counter()  # by owner
        self.time_s: Counter[int] = Counter()  # by model

    @property
    def owners(self) -> set[str]:
        return {job_id[0] for job_id, left in self.left.items() if left}

    def add(self, job_id: str, work: Work) -> None:
        self.works[job_id], self.left[job_id] = work, work.places
        rows = [next(self._rows) for _ in range(work.rows)]
        self.schedulers[work.model].add(job_id, rows, work, owner=job_id[0])

    def step(self) -> tuple[int, Batch] | None:
        """End the tick that began first, once all are in flight that may be; returns its model and its batch.

        None when there is nothing to do.
        """
        while self._begin():
            pass
        if not self.in_flight:
            return None
        turn, batch, seconds = self.in_flight.popleft()
        model = turn.model
        self.now_s += seconds
        self.time_s[model] += seconds  # type: ignore[assignment]
        for picked in batch.jobs:
            self.left[picked.job_id] -= picked.places
            self.places[picked.job_id[0]] += picked.places
        self.ends |= dict.fromkeys(self.schedulers[model].advance(batch).finished, self.now_s)
        self.turns.stepped(turn, seconds)
        return model, batch

    def _begin(self) -> bool:
        turn = self.turns.next()
        if turn is None or (self.in_flight and self.in_flight[0][0].model != turn.model):
            return False
        model = turn.model
        if (batch := self.schedulers[model].next_batch()) is None:
            return False
        assert batch == self.schedulers[model].next_batch(), "choosing changes nothing"
        self.schedulers[model].begin(batch)
        seconds = self.speeds[model].tick_s(batch.places, overlaps=bool(self.in_flight))
        self.in_flight.append((turn, batch, seconds))
        return True

    def tick(self) -> dict[str, int] | None:
        """Do a tick; returns how many places each owner had."""
        if (stepped := self.step()) is None:
            return None
        places: Counter[str] = Counter()
        for picked in stepped[1].jobs:
            places[picked.job_id[0]] += picked.places
        return dict(places)

    def run(self) -> None:
        while self.step() is not None:
            pass

    def pending(self) -> list[Pending]:
        return [Pending(job, self.works[job], left, owner=job[0]) for job, left in self.left.items() if left]

    def forecast(self, until: str | None = None) -> dict[str, Outlook]:
        return forecast(self.pending(), self.speeds, until, self.times.of(self.owners))
