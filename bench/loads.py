"""What a contender is put through: each load gives records and is bounded in time. No arithmetic on them here."""

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bench import arrivals
from bench.client import MOST_OUTSTANDING, drive, open_client, poll_etas
from bench.records import Answer, Arrival, Ask, Counters, Crowd, Etas, Loaded, Memory
from bench.servers import Running

IDLE = Ask(n=1, steps=50)
SATURATION = Ask(n=1, steps=50)
SATURATION_OF_16 = Ask(n=16, steps=50)
SATURATION_OF_DPMPP = Ask(n=1, steps=50, sampler="dpmpp_2m")
LONG, SHORT = Ask(n=8, steps=1000), Ask(n=1, steps=20)
STEPS_N = 4
LOAD = 0.8  # of the saturated row-steps/s, where requests come at random
HANG_UP_SHARE = 0.2
BATCH = 16  # rows a pass of a server that does not say
OUTSTANDING = 48  # at saturation: a full batch for each of several workers, and more waiting
MANY_S = 400.0  # at most, for all the requests before memory is read
SETTLE_S = 45.0  # for abandoned work, to be counted as wasted
STILL_S = 0.6  # a server that counts nothing for so long has nothing left to do
POLL_S = 0.2
FIRST_STEP_STEPS = 3
LEAD_S = 0.5  # for what runs beside a load, to begin before it


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the loads are and how many requests they have; the defaults are for the record."""

    rounds: int = 3
    idle_requests: int = 15
    warm_up_s: float = 3.0
    window_s: float = 10.0
    bare_s: float = 4.0  # a batch size
    mixed_s: float = 40.0
    mixed_long_at_s: tuple[float, ...] = (0.0, 15.0)
    shorts_per_s: float = 1.0
    burst: int = 100
    steps_s: float = 60.0
    policy_s: float = 150.0
    hang_ups_s: float = 20.0
    first_steps: int = 100
    first_steps_s: float = 15.0
    identical: int = 300
    eta_jobs: int = 32
    crowd: int = 1000
    crowd_s: float = 6.0
    requests: int = 10_000
    requests_before: int = 500
    most_steps: int = 1000
    drain_s: float = 120.0


QUICK = Lengths(
    rounds=1, idle_requests=2, warm_up_s=0.5, window_s=1.5, bare_s=0.4, mixed_s=2.0, mixed_long_at_s=(0.0,),
    shorts_per_s=2.0, burst=5, steps_s=2.0, policy_s=2.0, hang_ups_s=2.0, first_steps=5, first_steps_s=1.0, identical=8,
    eta_jobs=4, crowd=40, crowd_s=1.0, requests=60, requests_before=20, most_steps=60, drain_s=8.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's turn in one round."""

    server: Running
    round: int
    lengths: Lengths
    capacity: float  # row-steps/s of tminus; scales what comes at random, for every contender alike

    @property
    def places(self) -> int:
        """How many rows a tick may have."""
        return self.server.places or BATCH

    async def idle(self) -> Loaded:
        """One request after the other."""
        answers: list[Answer] = []
        async with open_client(self.server.url) as http:
            before, before_s = await self.server.read_at(http)
            for number in range(self.lengths.idle_requests):
                answers += await drive(http, [Arrival(0.0, IDLE, number)], drain_s=self.lengths.drain_s)
            return await self._loaded(http, "idle", before, before_s, answers)

    async def saturation(self, name: str = "saturation", ask: Ask = SATURATION) -> Loaded:
        """More than it can do, of one size; counted in a window after a warm-up. What is left is given up."""
        lengths = self.lengths
        seconds = lengths.warm_up_s + lengths.window_s + 1
        comers = arrivals.saturating(ask, OUTSTANDING, 3 * self.capacity, seconds)
        async with open_client(self.server.url) as http:
            start = await self.server.read(http)
            window, took_s = await self._count_beside(http, comers, lengths.warm_up_s, lengths.window_s, OUTSTANDING)
            took = (await self.server.read(http)).row_steps - start.row_steps
        return Loaded(name, self.server.contender.key, self.round, took_s, window, took, ())

    async def _count_beside(
        self,
        http: httpx.AsyncClient,
        comers: Sequence[Arrival],
        warm_up_s: float,
        window_s: float,
        most_outstanding: int = MOST_OUTSTANDING,
    ) -> tuple[Counters, float]:
        """Count in a window of a load that is given up after it."""
        drain_s = self.lengths.drain_s
        load = asyncio.create_task(drive(http, comers, drain_s=drain_s, most_outstanding=most_outstanding))
        try:
            await asyncio.sleep(warm_up_s)
            return await self.server.count(http, window_s)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)

    async def mixed(self) -> Loaded:
        """Long jobs, and short requests at random."""
        lengths = self.lengths
        long = Ask(LONG.n, min(LONG.steps, 2 * lengths.most_steps))
        comers = arrivals.long_and_short(long, lengths.mixed_long_at_s, SHORT, lengths.shorts_per_s, lengths.mixed_s)
        return await self._open_loop("mixed", comers)

    async def burst(self) -> Loaded:
        """Many requests at one moment."""
        return await self._open_loop("burst", arrivals.at_once([IDLE] * self.lengths.burst))

    async def steps(self) -> Loaded:
        """80 % of 20 steps, 15 % of 50, 5 % of 1000, at random."""
        rate, lengths = LOAD * self.capacity, self.lengths
        return await self._open_loop("steps", arrivals.of_steps(STEPS_N, rate, lengths.steps_s, lengths.most_steps))

    async def policy(self) -> Loaded:
        """Run the mixed load for longer, so that a 99th percentile says something."""
        rate, lengths = LOAD * self.capacity, self.lengths
        return await self._open_loop("policy", arrivals.of_steps(STEPS_N, rate, lengths.policy_s, lengths.most_steps))

    async def hang_ups(self) -> Loaded:
        """Some of the clients leave before they have their answer."""
        count = max(5, round(LOAD * self.capacity * self.lengths.hang_ups_s / (2 * 75)))
        asks = [Ask(2, 50 if number % 2 else 100) for number in range(count)]
        comers = arrivals.poisson(asks, self.lengths.hang_ups_s, seed=7)
        # What an answer is expected to take: a server that shares its speed among all takes 1 / (1 - load) as long.
        comers = arrivals.with_hang_ups(comers, HANG_UP_SHARE, 1 / (self.capacity * (1 - LOAD)))
        return await self._open_loop("hang-ups", comers)

    async def first_step(self) -> Loaded:
        """Small requests beside long jobs that always take half of the places: there is a place free."""
        lengths = self.lengths
        small = arrivals.poisson([Ask(1, FIRST_STEP_STEPS)] * lengths.first_steps, lengths.first_steps_s, seed=8)
        async with open_client(self.server.url) as http:
            beside = asyncio.create_task(self._one_after_the_other(http, Ask(max(1, self.places // 2), 1000)))
            await asyncio.sleep(LEAD_S)
            before, before_s = await self.server.read_at(http)
            answers = await drive(http, small, drain_s=lengths.drain_s)
            loaded = await self._loaded(http, "first-step", before, before_s, answers)
            beside.cancel()
            await asyncio.wait([beside])
            return loaded

    async def _one_after_the_other(self, http: httpx.AsyncClient, ask: Ask) -> None:
        """Ask for the same job again and again, until cancelled."""
        for number in itertools.count():
            await drive(http, [Arrival(0.0, ask, number)], drain_s=self.lengths.drain_s)

    async def identity_asked(self, model: Mapping[str, Any], classes: int, *, loaded: bool) -> Loaded:
        """Requests of all kinds, all at once or one after the other."""
        lengths = self.lengths
        steps = tuple(min(steps, lengths.most_steps) for steps in (5, 10, 20, 40))
        asks = arrivals.of_all_kinds(lengths.identical, arrivals.all_ways(model, steps), classes)
        comers = arrivals.at_once(asks)
        if loaded:
            return await self._open_loop("identity", comers)
        answers: list[Answer] = []
        async with open_client(self.server.url) as http:
            before, before_s = await self.server.read_at(http)
            for comer in comers:
                answers += await drive(http, [comer], drain_s=lengths.drain_s)
            return await self._loaded(http, "identity alone", before, before_s, answers)

    async def etas(self) -> Etas:
        """Jobs of many sizes at once, none later, and what the server says of them meanwhile."""
        lengths = self.lengths
        steps = tuple(min(steps, lengths.most_steps) for steps in (50, 100, 200, 400))
        comers = arrivals.at_once(arrivals.assorted(lengths.eta_jobs, steps))
        async with open_client(self.server.url) as http:
            start_s = asyncio.get_running_loop().time()
            polls = asyncio.create_task(poll_etas(http, start_s, POLL_S))
            answers = await drive(http, comers, drain_s=lengths.drain_s, start_s=start_s)
            polls.cancel()
            samples = await polls
        return Etas(tuple(samples), tuple(answers))

    async def crowds(self) -> tuple[Crowd, ...]:
        """The time of a full tick: with no job waiting, with a thousand jobs waiting, and with none again."""
        return tuple([await self._crowd(waiting) for waiting in (0, self.lengths.crowd, 0)])

    async def memory(self) -> tuple[Memory, ...]:
        """Resident memory after some requests and after many."""
        lengths, done = self.lengths, 0
        found = []
        async with open_client(self.server.url, connections=BATCH) as http:
            for upto in (lengths.requests_before, lengths.requests):
                await self._ask_many(http, range(done, upto))
                done = upto
                counters, _ = await self.server.read_at(http)
                found.append(Memory(done, counters.rss_bytes or math.nan))
        return tuple(found)

    async def settled(self, limit_s: float) -> bool:
        """Wait until the server counts nothing any more; False if it still does at the limit."""
        async with open_client(self.server.url) as http:
            return await self._settle(http, limit_s)

    async def _open_loop(self, name: str, comers: Sequence[Arrival], drain_s: float | None = None) -> Loaded:
        async with open_client(self.server.url) as http:
            before, before_s = await self.server.read_at(http)
            drain_s = self.lengths.drain_s if drain_s is None else drain_s
            answers = await drive(http, comers, drain_s=drain_s)
            return await self._loaded(http, name, before, before_s, answers)

    async def _loaded(
        self, http: httpx.AsyncClient, name: str, before: Counters, before_s: float, answers: Sequence[Answer]
    ) -> Loaded:
        after, after_s = await self.server.read_at(http)
        # What was left behind is still worked on, or is it?
        if any(answer.outcome in ("left", "unanswered") for answer in answers):
            await self._settle(http, min(SETTLE_S, self.lengths.drain_s))
        end, _ = await self.server.read_at(http)
        return Loaded(
            name,
            self.server.contender.key,
            self.round,
            after_s - before_s,
            after.since(before),
            end.row_steps - before.row_steps,
            tuple(answers),
        )

    async def _crowd(self, waiting: int) -> Crowd:
        async with open_client(self.server.url) as http:
            comers = arrivals.at_once([Ask(1, 1000)] * (self.places + waiting))
            until_all_are_in_s = 1 + waiting / 150
            window, took_s = await self._count_beside(http, comers, until_all_are_in_s, self.lengths.crowd_s)
            await self._settle(http, self.lengths.drain_s)
        ticks = max(1.0, window.ticks)
        return Crowd(waiting, (window.ticks_s or math.nan) / ticks, took_s / ticks, window.places / ticks)

    async def _ask_many(self, http: httpx.AsyncClient, numbers: range) -> None:
        """Keep a batch of them under way; every one must be answered."""
        queue = iter(numbers)

        async def keep_asking() -> None:
            for number in queue:
                response = await http.post("/sample", json=Ask(1, 1 + number % 2).to_body(seed=number))
                if response.status_code != 200:
                    raise RuntimeError(f"request {number}: {response.status_code} {response.text[:300]}")

        async with asyncio.timeout(MANY_S), asyncio.TaskGroup() as group:
            for _ in range(BATCH):
                group.create_task(keep_asking())

    async def _settle(self, http: httpx.AsyncClient, limit_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        end_s = clock() + limit_s
        last, _ = await self.server.read_at(http)
        while clock() < end_s:
            await asyncio.sleep(STILL_S)
            now, _ = await self.server.read_at(http)
            if now.row_steps == last.row_steps:
                return True
            last = now
        return False
