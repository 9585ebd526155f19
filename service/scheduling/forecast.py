"""Predicts when each job ends, and how many jobs are ahead of it. No torch, asyncio, clock or lock.

A forecast runs the real schedulers in simulated time, on jobs without latents. Successive ticks are mostly alike, so
the simulation takes many ticks at once. Such a group of ticks is called a stride.
"""

import math
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from statistics import median

from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.scheduler import BatchPolicy, ModelScheduler, Scheduler
from tminus.service.work import Batch, Outlook, Work

# A stride lasts at most 1/FINE of the simulated time so far, or of the steps until a row ends. This also limits the
# relative error of a predicted time. A stride may be longer if every tick up to a row's end has the same rows.
# Measurements: docs/scheduling.md.
FINE = 32
EARLY = 4  # up to 1/EARLY of a batch's jobs may end before the stride does; their places then stay empty

LEARNING_RATE = 0.02  # weight of a new tick in the moving average; small, because ticks vary
OUTLIER = 4.0  # a tick counts as at most OUTLIER times slower or faster than predicted
MAX_CORRECTION = 100.0

WINDOW_S = 10.0
WINDOWS = 6  # number of windows; the forecast uses their median, so a short burst has no effect
MOST_SHARE = 0.9  # upper bound of a share; a larger share would make the ETA useless


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured speed of a model."""

    policy: BatchPolicy  # if its ticks are not measured, every job is predicted to take 0 s
    max_rows: int  # number of slots in the model's engine; each image needs one
    decode_s: float = 0.0  # seconds to decode one image of a latent model
    encode_s: float = 0.0
    correction: float = 1.0  # current duration of a tick divided by its duration at the start

    @property
    def place_s(self) -> float:
        """Predicted duration of a full tick that overlaps another tick, divided by the number of places."""
        return self.tick_s(self.policy.max_batch, overlaps=True) / self.policy.max_batch

    @property
    def longest_tick_s(self) -> float:
        """Predicted duration of the largest tick."""
        return self.tick_s(self.policy.full_batch)

    def tick_s(self, places: int, *, overlaps: bool = False) -> float:
        """Predict the duration of a tick.

        overlaps: another tick is in flight. The duration then counts from the end of the other tick.
        """
        times = self.policy.times
        return self.correction * times.seconds(places) * ((times.overlapped or 1.0) if overlaps else 1.0)

    def observe(self, places: int, seconds: float, *, overlaps: bool = False) -> "Speed":
        """Return a copy with a correction that takes a measured tick into account."""
        predicted_s = self.tick_s(places, overlaps=overlaps)
        if predicted_s <= 0 or not seconds >= 0:
            return self
        ratio = min(max(seconds / predicted_s, 1 / OUTLIER), OUTLIER)
        correction = self.correction * (1 + LEARNING_RATE * (ratio - 1))
        return replace(self, correction=min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION))

    def with_autoencoder_s(self, work: Work, *, has_picture: bool) -> Work:
        """Return a copy of a job's work with its autoencoder time. has_picture: the job starts from a picture."""
        autoencoder_s = work.rows * self.decode_s + (self.encode_s if has_picture else 0.0)
        return replace(work, autoencoder_s=autoencoder_s)


@dataclass(frozen=True, slots=True)
class Pending:
    """A job in a forecast.

    The scheduler keeps the rows of a job nearly level, so a forecast assumes that they are level.
    """

    job_id: str
    work: Work
    places_left: int  # sum over all rows
    autoencoder_s: float = 0.0  # remaining seconds to encode and decode; 0 unless the model is latent
    owner: str = ""
    due_s: float | None = None  # when the job's deadline passes, by the clock of its admission

    @property
    def steps(self) -> Sequence[int] | None:
        """The next step of each row; None if the job has not begun."""
        work, left = self.work, self.places_left
        if left == work.places:
            return None
        step = bisect_left(range(work.steps), -left / work.rows, key=lambda step: -work.places_left(step))
        more = left - work.rows * work.places_left(step)
        behind = -(-more // work.places_per_row(step - 1)) if more else 0
        return (step - 1,) * behind + (step,) * (work.rows - behind)


@dataclass(frozen=True, slots=True)
class Stride:
    """A group of simulated ticks that count as equal."""

    model: int
    places: Mapping[str, int]  # number of places that were run, keyed by job id
    ended: Mapping[str, float]  # simulated time in seconds when each finished job ended, keyed by job id


class Simulation:
    """Simulates the given jobs, assuming that no other job arrives."""

    def __init__(
        self, jobs: Sequence[Pending], speeds: Mapping[int, Speed], service_time_s: Mapping[str, float] | None = None
    ) -> None:
        """jobs: in order of arrival. speeds: keyed by model number. service_time_s: keyed by owner."""
        self._speeds, self._model_scheduler = speeds, ModelScheduler[int]()
        self._times = OwnerTimes()
        self._schedulers: dict[int, Scheduler] = {}
        self._works = {job.job_id: job.work for job in jobs}
        self.now_s, arrivals = 0.0, count()
        for job in jobs:
            model = job.work.model
            if model not in self._schedulers:
                self._schedulers[model] = Scheduler(speeds[model].policy, arrivals, self._times)
                self._model_scheduler.put(model, self._schedulers[model], speeds[model].longest_tick_s)
            if job.places_left > 0:
                self._schedulers[model].add(job.job_id, range(job.work.rows), job.work, job.steps, job.owner)
        if service_time_s is not None:
            self._times.stepped({owner: service_time_s[owner] for owner in self._times.owners})

    def running(self) -> frozenset[str]:
        """Return the ids of the jobs that have all their unfinished rows in the next tick."""
        schedulers = [self._schedulers[model] for model in self._model_scheduler.shares()]
        batches = [(scheduler, scheduler.next_batch()) for scheduler in schedulers]
        return frozenset(
            picked.job_id
            for scheduler, batch in batches
            for picked in (batch.jobs if batch is not None else ())
            if len(picked.steps) == scheduler.rows_left(picked.job_id)
        )

    def step(self) -> Stride | None:
        """Simulate one stride. Returns None if no work is left."""
        if (turn := self._model_scheduler.next()) is None:
            return None
        model = turn.model
        scheduler, batches = self._schedulers[model], list[Batch]()
        while (batch := scheduler.next_batch()) is not None:  # collect all ticks that may be in flight together
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
        self._model_scheduler.stepped(turn, ticks * round_s)
        self.now_s += ticks * round_s
        return Stride(model, places, ended)

    def _ticks(self, scheduler: Scheduler, batch: Batch, tick_s: float) -> tuple[int, dict[str, int]]:
        """Return the length of the next stride in ticks, and the number of ticks until each job ends."""
        busy = len(self._model_scheduler.busy())
        whole = True  # True if the batch has every unfinished row of its jobs; it then stays the same until a row ends
        alike, last = [], {}
        for job_id, rows, _ in batch.jobs:
            work, steps = self._works[job_id], {step for step, _ in rows}
            whole = whole and len(rows) == scheduler.rows_left(job_id)
            alike.append(min(_alike(work, step) for step in steps))
            last[job_id] = work.steps - min(steps)
        alike.sort()
        passed = int(self.now_s / tick_s) if tick_s else 0
        ticks = min(passed // FINE // busy, alike[len(alike) // EARLY])
        if busy == 1 and self._times.has_one_owner:  # no other model or owner gets ticks in between
            turn = scheduler.turn_ticks(batch)
            ticks = max(ticks, alike[0] if whole and turn is None else alike[0] // FINE)
            ticks = min(ticks, turn) if turn else ticks
        return max(1, ticks), last


def _alike(work: Work, step: int) -> int:
    """Return the number of steps, from this step on, that all cost the same.

    The cost changes where guidance starts or stops. The job's last step also ends the count.
    """
    guided = work.guided
    return (guided.start if step < guided.start else guided.stop if step < guided.stop else work.steps) - step


def forecast(
    jobs: Sequence[Pending],
    speeds: Mapping[int, Speed],
    until: str | None = None,
    service_time_s: Mapping[str, float] | None = None,
    within_s: float = math.inf,
) -> dict[str, Outlook]:
    """Predict the outlook of each job, keyed by job id. Assumes that no other job arrives.

    jobs: in order of arrival. until: the id of a job; the forecast stops when that job ends. service_time_s: keyed by
    owner. within_s: the forecast stops after this simulated time, and jobs that end later may be missing.
    """
    simulation = Simulation(jobs, speeds, service_time_s)
    outlooks = {job.job_id: Outlook(0, 0.0) for job in jobs if job.places_left <= 0}  # all steps of these jobs are done
    shortest_first = sorted(jobs, key=lambda job: job.places_left * speeds[job.work.model].policy.place_s)
    ranks = {job.job_id: rank for rank, job in enumerate(shortest_first)}
    running = simulation.running()
    ended_ranks: list[int] = []
    while until not in outlooks and simulation.now_s <= within_s and (stride := simulation.step()) is not None:
        for job_id in stride.ended:
            insort(ended_ranks, ranks[job_id])
        for job_id, end_s in stride.ended.items():
            position = 0 if job_id in running else bisect_left(ended_ranks, ranks[job_id])
            outlooks[job_id] = Outlook(position, end_s)
    return _add_autoencoder_time(outlooks, jobs)


def _add_autoencoder_time(outlooks: dict[str, Outlook], jobs: Sequence[Pending]) -> dict[str, Outlook]:
    """Add the autoencoder's time to each ETA.

    The autoencoder takes one denoised job at a time. The job of the owner with the least service time goes first.
    """
    latent = [job for job in jobs if job.autoencoder_s and job.job_id in outlooks]
    coming = deque(sorted(latent, key=lambda job: outlooks[job.job_id].eta_s))
    waiting: defaultdict[str, deque[Pending]] = defaultdict(deque)  # keyed by owner
    service_time_s: Counter[str] = Counter()
    free_s = 0.0
    while coming or waiting:
        if not waiting:
            free_s = max(free_s, outlooks[coming[0].job_id].eta_s)
        while coming and outlooks[coming[0].job_id].eta_s <= free_s:
            waiting[coming[0].owner].append(coming.popleft())
        owner = min(waiting, key=service_time_s.__getitem__)
        job = waiting[owner].popleft()
        if not waiting[owner]:
            del waiting[owner]
        free_s += job.autoencoder_s
        service_time_s[owner] += job.autoencoder_s  # type: ignore[assignment]
        outlooks[job.job_id] = replace(outlooks[job.job_id], eta_s=free_s)
    return outlooks


def stretch(share: float, least_share: float) -> float:
    """Return how many times longer a job takes if shorter jobs use this share of the machine.

    least_share: the share of the machine that the job always keeps.
    """
    return 1 / max(1 - min(share, MOST_SHARE), least_share)


class Arrivals:
    """Records the work of the last minute's jobs, so an ETA can allow for more jobs like them.

    A new job overtakes an earlier job that has more work left. If such new jobs use a certain share of the machine, the
    earlier job takes 1 / (1 - share) times as long. This is the busy period of a priority queue (Kleinrock 1976, vol.
    2, sec. 3.3).
    """

    def __init__(self) -> None:
        self._current, self._sizes = 0, list[float]()  # number of the current window, and its jobs' sizes in seconds
        # For each past window: its number, its jobs' sizes in ascending order, and the cumulative sums of the sizes.
        self._over: deque[tuple[int, list[float], list[float]]] = deque(maxlen=WINDOWS)

    def add(self, work_s: float, now_s: float) -> None:
        self._advance_clock(now_s)
        self._sizes.append(work_s)

    def are_over(self, now_s: float) -> bool:
        """Return True if all recorded jobs are too old to matter."""
        self._advance_clock(now_s)
        return not self._sizes and all(number < self._current - WINDOWS for number, *_ in self._over)

    def share(self, left_s: float, now_s: float) -> float:
        """Return the share of the machine that went to jobs with less than `left_s` seconds of work.

        Only past windows count, not the current one.
        """
        self._advance_clock(now_s)
        shorter = [0.0] * WINDOWS
        for number, sizes, sums in self._over:
            if number >= self._current - WINDOWS:
                shorter[number - self._current] = sums[bisect_left(sizes, left_s)]
        return median(shorter) / WINDOW_S

    def _advance_clock(self, now_s: float) -> None:
        current = int(now_s // WINDOW_S)
        if current > self._current:
            sizes = sorted(self._sizes)
            self._over.append((self._current, sizes, [0.0, *accumulate(sizes)]))
            self._current, self._sizes = current, []
