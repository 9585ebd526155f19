"""The loads that a contender is put through. Each gives records and is bounded in time; bench/figures.py sums up."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import httpx

from bench import arrivals
from bench.client import drive, meanwhile, open_client
from bench.figures import row_steps_per_s
from bench.records import SLO, Answer, Arrival, Ask, Counters, Loaded
from bench.servers import Running
from tminus.service.cli.bench import ALONE, MIX, Mix, read_mix

IDLE = Ask(n=1, steps=20)
SATURATION = {"saturation_1": Ask(n=1, steps=50), "saturation_16": Ask(n=16, steps=50)}
LONG, SHORT = Ask(n=8, steps=1000), Ask(n=1, steps=20)
HANG_UP_LOAD, HANG_UP_SHARE = 0.8, 0.2  # of the contender's own row-steps/s, saturated; of the clients
BATCH = 16  # rows a pass of a server that does not say
OUTSTANDING = 48  # at saturation: a full batch for each of several workers, and more waiting
SETTLE_S = 45.0  # for abandoned work, to be counted as wasted
STILL_S = 0.6  # a server that counts nothing for so long, and for so many full passes, has nothing left to do
STILL_PASSES = 4


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the loads are and how many requests they have; the defaults are for the record."""

    rounds: int = 2
    idle_requests: int = 12
    warm_up_s: float = 3.0
    window_s: float = 7.0
    trial_s: float = 4.0  # of each way to set a peer up
    bare_s: float = 2.5  # a batch size
    lock_step_s: float = 3.0  # of joined streams and of free ones, each time
    mixed_s: float = 25.0
    mixed_long: Ask = LONG
    mixed_long_at_s: tuple[float, ...] = (0.0, 10.0)
    shorts_per_s: float = 1.0
    hang_ups_s: float = 12.0
    slo_s: float = 25.0  # a rate
    slo_mix: str = MIX
    drain_s: float = 120.0

    @property
    def mix(self) -> Mix:
        """The requests of the load `slo`."""
        return read_mix(self.slo_mix)


QUICK = Lengths(
    rounds=1, idle_requests=2, warm_up_s=0.5, window_s=1.5, trial_s=0.8, bare_s=0.3, lock_step_s=0.4, mixed_s=2.0,
    mixed_long=Ask(n=8, steps=60), mixed_long_at_s=(0.0,), shorts_per_s=2.0, hang_ups_s=2.0,
    slo_s=1.0, slo_mix="2:1x5,1:4x10", drain_s=10.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's turn in one round."""

    server: Running
    round: int
    lengths: Lengths
    capacity: float  # row-steps/s that this contender makes, saturated, or a guess

    async def idle(self) -> Loaded:
        """Send one request after the other."""
        async with open_client(*self.server.urls) as http:
            before, before_s = await self.server.read_at(http)
            answers = await self._one_by_one(http, IDLE, self.lengths.idle_requests)
            return await self._loaded(http, "idle", before, before_s, answers)

    async def alone(self) -> dict[str, float]:
        """Measure how long a request of each size of the mix takes alone: the median. The server is warm."""
        found: dict[str, float] = {}
        async with open_client(*self.server.urls) as http:
            for size in self.lengths.mix:
                answers = await self._one_by_one(http, Ask(size.n, size.steps), ALONE)
                if any(answer.outcome != "ok" for answer in answers):
                    raise RuntimeError(f"a request of {size} had no answer on an idle server")
                found[str(size)] = median(answer.waited_s for answer in answers)
        return found

    async def saturation(self, load: str = "saturation_1") -> Loaded:
        """Send more than it can do, of one size, and count in a window after a warm-up. What is left is given up."""
        lengths, ask = self.lengths, SATURATION[load]
        seconds = lengths.warm_up_s + lengths.window_s + 1
        comers = arrivals.saturating(ask, OUTSTANDING, 3 * self.capacity, seconds)
        async with open_client(*self.server.urls) as http:
            start = await self.server.read(http)
            async with meanwhile(drive(http, comers, drain_s=lengths.drain_s, most_outstanding=OUTSTANDING)):
                await asyncio.sleep(lengths.warm_up_s)
                window, took_s = await self.server.count(http, lengths.window_s)
            took = (await self.server.read(http)).row_steps - start.row_steps
        return Loaded(load, self.server.contender.key, self.round, took_s, window, took, ())

    async def rate(self, seconds: float) -> float:
        """Measure row-steps per second under full load of one image a request, in a short trial."""
        trial = replace(self, lengths=replace(self.lengths, window_s=seconds))
        return row_steps_per_s(await trial.saturation())

    async def mixed(self) -> Loaded:
        """Send long jobs, and short requests at random."""
        lengths = self.lengths
        comers = arrivals.long_and_short(
            lengths.mixed_long, lengths.mixed_long_at_s, SHORT, lengths.shorts_per_s, lengths.mixed_s
        )
        return await self._open_loop("mixed", comers)

    async def hang_ups(self) -> Loaded:
        """Send requests, of which some clients leave before they have their answer."""
        count = max(5, round(HANG_UP_LOAD * self.capacity * self.lengths.hang_ups_s / (2 * 75)))
        asks = [Ask(2, 50 if number % 2 else 100) for number in range(count)]
        comers = arrivals.poisson(asks, self.lengths.hang_ups_s, seed=7)
        # What an answer is expected to take: a server that shares its speed among all takes 1 / (1 - load) as long.
        comers = arrivals.with_hang_ups(comers, HANG_UP_SHARE, 1 / (self.capacity * (1 - HANG_UP_LOAD)))
        return await self._open_loop("hang_ups", comers)

    async def slo(self, load: str, own_rate: float, drain_s: float) -> Loaded:
        """Send the mix at a share of the executor's own rate. What has no answer so long after the last is given up."""
        comers = arrivals.of_mix(self.lengths.mix, SLO[load] * own_rate, self.lengths.slo_s, seed=self.round)
        return await replace(self, lengths=replace(self.lengths, drain_s=drain_s))._open_loop(load, comers)

    @property
    def still_s(self) -> float:
        """How long nothing may be counted while there is still work."""
        return max(STILL_S, STILL_PASSES * BATCH / self.capacity)

    async def settled(self, limit_s: float) -> bool:
        """Wait until the server counts nothing any more; False if it still does at the limit."""
        async with open_client(*self.server.urls) as http:
            return await self._settle(http, limit_s)

    async def _one_by_one(self, http: httpx.AsyncClient, ask: Ask, count: int) -> list[Answer]:
        answers: list[Answer] = []
        for number in range(count):
            answers += await drive(http, [Arrival(0.0, ask, number)], drain_s=self.lengths.drain_s)
        return answers

    async def _open_loop(self, name: str, comers: Sequence[Arrival]) -> Loaded:
        async with open_client(*self.server.urls) as http:
            before, before_s = await self.server.read_at(http)
            answers = await drive(http, comers, drain_s=self.lengths.drain_s)
            return await self._loaded(http, name, before, before_s, answers)

    async def _loaded(
        self, http: httpx.AsyncClient, name: str, before: Counters, before_s: float, answers: Sequence[Answer]
    ) -> Loaded:
        after, after_s = await self.server.read_at(http)
        # A server may still work on what its clients have left: that is counted too, but for no figure of `slo`.
        if name not in SLO and any(answer.outcome in ("left", "unanswered") for answer in answers):
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

    async def _settle(self, http: httpx.AsyncClient, limit_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        end_s = clock() + limit_s
        last, _ = await self.server.read_at(http)
        while clock() < end_s:
            await asyncio.sleep(self.still_s)
            now, _ = await self.server.read_at(http)
            if now.row_steps == last.row_steps:
                return True
            last = now
        return False
