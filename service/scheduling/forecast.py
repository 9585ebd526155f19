"""Predicts when each job will end and how many go before it. Pure: no torch, no asyncio, no clock, no lock.

The policy is written once, in the schedulers: here these run ahead of the clock, on jobs that have no latents. Most of
their ticks are like the one before, so they take strides of many ticks at once.
"""

from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from statistics import median

from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.scheduler import Scheduler, Sharing, Turns
from tminus.service.work import Batch, Outlook, Work

# Between two events a stride takes at most one such part of what has passed by then, or of what the row has left that
# ends first, so that no time is wrong by much more than that. Figures: docs/scheduling.md.
FINE = 32
EARLY = 4  # one such part of the jobs in a batch may end within a stride, and leave their places empty

LEARNING_RATE = 0.02  # a slow average: one tick says little
OUTLIER = 4.0  # a tick counts as at most so many times slower than predicted, or faster
MAX_CORRECTION = 100.0

WINDOW_S = 10.0
WINDOWS = 6  # the median of so many counts: a burst is one of them, and does not go on
MOST_SHARE = 0.9  # beyond it, nothing can be foreseen


@dataclass(frozen=True, slots=True)
class Speed:
    """What admission and forecast know of one model."""

    sharing: Sharing  # until its ticks are measured nothing is refused for time
    max_rows: int  # images that its engine holds
    decode_s: float = 0.0  # of one image of a latent model
    encode_s: float = 0.0
    correction: float = 1.0  # how much longer ticks take now than was measured at the start

    @property
    def place_s(self) -> float:
        """How long a place takes in a full tick under full load."""
        return self.tick_s(self.sharing.max_batch, overlaps=True) / self.sharing.max_batch

    @property
    def longest_tick_s(self) -> float:
        """Predicted seconds of the largest tick."""
        return self.tick_s(self.sharing.full_batch)

    def tick_s(self, places: int, *, overlaps: bool = False) -> float:
        """Predict how long a tick takes, in seconds.

        overlaps: whether another tick is in flight. The time then counts from the end of that tick.
        """
        times = self.sharing.times
        return self.correction * times.seconds(places) * ((times.overlapped or 1.0) if overlaps else 1.0)

    def observe(self, places: int, seconds: float, *, overlaps: bool = False) -> "Speed":
        """Learn from a tick."""
        predicted_s = self.tick_s(places, overlaps=overlaps)
        if predicted_s <= 0 or not seconds >= 0:
            return self
        ratio = min(max(seconds / predicted_s, 1 / OUTLIER), OUTLIER)
        correction = self.correction * (1 + LEARNING_RATE * (ratio - 1))
        return replace(self, correction=min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION))

    def with_beside(self, work: Work, *, has_picture: bool) -> Work:
        """Add to a job's work what it takes beside the ticks. has_picture: it starts from one."""
        beside_s = work.rows * self.decode_s + (self.encode_s if has_picture else 0.0)
        return replace(work, beside_s=beside_s)


@dataclass(frozen=True, slots=True)
class Pending:
    """A job as the forecast needs it. Its rows are taken to be level, as the scheduler keeps them."""

    job_id: str
    work: Work
    places_left: int  # of all its rows
    beside_s: float = 0.0  # of a latent model, what is left to encode and decode, in seconds
    owner: str = ""

    @property
    def steps(self) -> Sequence[int] | None:
        """The step that each row takes next; None: the first one."""
        work, left = self.work, self.places_left
        if left == work.places:
            return None
        step = bisect_left(range(work.steps), -left / work.rows, key=lambda step: -work.places_left(step))
        more = left - work.rows * work.places_left(step)
        behind = -(-more // work.places_per_row(step - 1)) if more else 0
        return (step - 1,) * behind + (step,) * (work.rows - behind)


@dataclass(frozen=True, slots=True)
class Stride:
    """What happened in some ticks that are alike."""

    model: int
    places: Mapping[str, int]  # that each job took
    ended: Mapping[str, float]  # when each job ended that did


class Ahead:
    """The jobs of all models, if no other job comes. Owns its state: a time from 0 s on, and the jobs of that time."""

    def __init__(
        self, jobs: Sequence[Pending], speeds: Mapping[int, Speed], had_s: Mapping[str, float] | None = None
    ) -> None:
        """jobs: in order of arrival, each of one of the models in speeds. had_s: by owner, the time it has had."""
        self._speeds, self._turns = speeds, Turns[int]()
        self._times = OwnerTimes()
        self._schedulers: dict[int, Scheduler] = {}
        self._works = {job.job_id: job.work for job in jobs}
        self.now_s, arrivals = 0.0, count()
        for job in jobs:
            model = job.work.model
            if model not in self._schedulers:
                self._schedulers[model] = Scheduler(speeds[model].sharing, arrivals, self._times)
                self._turns.put(model, self._schedulers[model], speeds[model].longest_tick_s)
            if job.places_left > 0:
                self._schedulers[model].add(job.job_id, range(job.work.rows), job.work, job.steps, job.owner)
        if had_s is not None:
            self._times.stepped({owner: had_s[owner] for owner in self._times.owners})

    def running(self) -> frozenset[str]:
        """The jobs all of whose rows step now."""
        schedulers = [self._schedulers[model] for model in self._turns.shares()]
        batches = [(scheduler, scheduler.next_batch()) for scheduler in schedulers]
        return frozenset(
            picked.job_id
            for scheduler, batch in batches
            for picked in (batch.jobs if batch is not None else ())
            if len(picked.steps) == scheduler.rows_left(picked.job_id)
        )

    def step(self) -> Stride | None:
        """Go on by some ticks that are alike; None when all work is done."""
        if (turn := self._turns.next()) is None:
            return None
        model = turn.model
        scheduler, batches = self._schedulers[model], list[Batch]()
        while (batch := scheduler.next_batch()) is not None:  # as many as are in flight together
            scheduler.begin(batch)
            batches.append(batch)
        if not batches:
            return None
        overlaps = scheduler.overlaps
        round_s = sum(self._speeds[model].tick_s(batch.places, overlaps=overlaps) for batch in batches)
        found = [self._ticks(scheduler, batch, round_s) for batch in batches]
        ticks, places, ended = min(ticks for ticks, _ in found), Counter[str](), dict[str, float]()
        last = {job_id: max(each.get(job_id, 0) for _, each in found) for _, each in found for job_id in each}
        for batch in batches:
            advance = scheduler.advance(batch, ticks)
            places.update(advance.places)
            ended |= {job_id: self.now_s + min(ticks, last[job_id]) * round_s for job_id in advance.finished}
        self._turns.stepped(turn, ticks * round_s)
        self.now_s += ticks * round_s
        return Stride(model, places, ended)

    def _ticks(self, scheduler: Scheduler, batch: Batch, tick_s: float) -> tuple[int, dict[str, int]]:
        """How many ticks from now on are taken to be alike, and how many the last row of each job needs to its end."""
        busy = len(self._turns.busy())
        whole = True  # whether the batch has all rows of its jobs, so that no other row's turn comes until one ends
        alike, last = [], {}
        for job_id, rows, _ in batch.jobs:
            work, steps = self._works[job_id], {step for step, _ in rows}
            whole = whole and len(rows) == scheduler.rows_left(job_id)
            alike.append(min(_alike(work, step) for step in steps))
            last[job_id] = work.steps - min(steps)
        alike.sort()
        passed = int(self.now_s / tick_s) if tick_s else 0
        ticks = min(passed // FINE // busy, alike[len(alike) // EARLY])
        if busy == 1 and self._times.one_alone:  # else others take turns with the batch
            turn = scheduler.turn_ticks(batch)
            ticks = max(ticks, alike[0] if whole and turn is None else alike[0] // FINE)
            ticks = min(ticks, turn) if turn else ticks
        return max(1, ticks), last


def _alike(work: Work, step: int) -> int:
    """How many steps from this one on cost the same: until the last, or until guidance goes on or off."""
    guided = work.guided
    return (guided.start if step < guided.start else guided.stop if step < guided.stop else work.steps) - step


def forecast(
    jobs: Sequence[Pending],
    speeds: Mapping[int, Speed],
    until: str | None = None,
    had_s: Mapping[str, float] | None = None,
) -> dict[str, Outlook]:
    """Predict each job's outlook, by its id, if no other job comes.

    jobs: in order of arrival. until: a job; only it and those that end before it are predicted. had_s: by owner, the
    time of the machine that it has had.
    """
    ahead = Ahead(jobs, speeds, had_s)
    outlooks = {job.job_id: Outlook(0, 0.0) for job in jobs if job.places_left <= 0}  # they wait for delivery only
    in_turn = sorted(jobs, key=lambda job: job.places_left * speeds[job.work.model].sharing.place_s)
    ranks = {job.job_id: rank for rank, job in enumerate(in_turn)}
    running = ahead.running()
    ended_ranks: list[int] = []
    while until not in outlooks and (stride := ahead.step()) is not None:
        for job_id in stride.ended:
            insort(ended_ranks, ranks[job_id])
        for job_id, end_s in stride.ended.items():
            position = 0 if job_id in running else bisect_left(ended_ranks, ranks[job_id])
            outlooks[job_id] = Outlook(position, end_s)
    return _with_beside(outlooks, jobs)


def _with_beside(outlooks: dict[str, Outlook], jobs: Sequence[Pending]) -> dict[str, Outlook]:
    """Add what comes beside the ticks: one job at a time, as their ticks end, of the owner that has had least of it."""
    beside = [job for job in jobs if job.beside_s and job.job_id in outlooks]
    coming = deque(sorted(beside, key=lambda job: outlooks[job.job_id].eta_s))
    waiting: defaultdict[str, deque[Pending]] = defaultdict(deque)  # by owner
    had_s: Counter[str] = Counter()
    free_s = 0.0
    while coming or waiting:
        if not waiting:
            free_s = max(free_s, outlooks[coming[0].job_id].eta_s)
        while coming and outlooks[coming[0].job_id].eta_s <= free_s:
            waiting[coming[0].owner].append(coming.popleft())
        owner = min(waiting, key=had_s.__getitem__)
        job = waiting[owner].popleft()
        if not waiting[owner]:
            del waiting[owner]
        free_s += job.beside_s
        had_s[owner] += job.beside_s  # type: ignore[assignment]
        outlooks[job.job_id] = replace(outlooks[job.job_id], eta_s=free_s)
    return outlooks


def stretch(share: float, least_share: float) -> float:
    """How many times as long a job takes while others go before it that take a share of the machine.

    least_share: that it gets in any case.
    """
    return 1 / max(1 - min(share, MOST_SHARE), least_share)


class Arrivals:
    """Owns the sizes of the jobs that were accepted in the last minute, so that an ETA can count on more such work.

    Under the shortest-first policy a job is overtaken by every later one that is shorter than what it has left. If such
    work takes a share of the machine, the job takes 1 / (1 - share) times as long: the busy period of a queue with
    priorities (Kleinrock 1976, vol. 2, sec. 3.3).
    """

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

    def share(self, left_s: float, now_s: float) -> float:
        """What share of the machine jobs take that are shorter than so much work.

        The window that is not over yet does not count.
        """
        self._go_on_to(now_s)
        shorter = [0.0] * WINDOWS
        for number, sizes, sums in self._over:
            if number >= self._current - WINDOWS:
                shorter[number - self._current] = sums[bisect_left(sizes, left_s)]
        return median(shorter) / WINDOW_S

    def _go_on_to(self, now_s: float) -> None:
        current = int(now_s // WINDOW_S)
        if current > self._current:
            sizes = sorted(self._sizes)
            self._over.append((self._current, sizes, [0.0, *accumulate(sizes)]))
            self._current, self._sizes = current, []
