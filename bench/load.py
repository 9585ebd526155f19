"""The client: a closed loop of requests that keeps a server full, and one request at a time on an idle one."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ANSWER_S = 180.0  # no request of the lists below takes longer, wherever it queues
SETTLE_S = 10.0
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Guidance other than 1 makes a row-step take two places."""

    n: int
    steps: int
    sampler: str = "ddpm"
    guidance: float = 1.0

    @property
    def row_steps(self) -> int:
        """How much it asks for."""
        return self.n * self.steps


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server says it has done since it started."""

    row_steps: float
    places: float  # rows through the U-Net
    ticks: float
    ticks_s: float  # time spent in ticks; 0 where the server does not say
    cpu_s: float  # of the whole process, all threads together
    saved: float | None = None  # row-steps of given up requests, not taken; None where the server gives up nothing


@dataclass(frozen=True, slots=True)
class Loaded:
    """One window at full load, and the account of the whole load around it."""

    row_steps_per_s: float
    places_per_s: float
    places_per_tick: float
    share_in_ticks: float
    cpu_s_per_place: float
    answered: int  # requests, in the whole load
    received_row_steps: int  # of those
    abandoned_row_steps: int  # of the requests in flight when the load ended
    counted: Counters  # in the whole load

    @property
    def agrees(self) -> bool:
        """Whether the server's count and the clients' account for the same row-steps."""
        asked = self.received_row_steps + self.abandoned_row_steps
        if self.counted.saved is not None:
            return self.counted.row_steps + self.counted.saved == asked
        return self.received_row_steps <= self.counted.row_steps <= asked

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "agrees": self.agrees}


Send = Callable[[httpx.AsyncClient, Ask, int], Awaitable[httpx.Response]]
Read = Callable[[httpx.AsyncClient], Awaitable[Counters]]


def unguided_asks() -> list[Ask]:
    """n 1..4 by 20, 50 and 100 steps, all DDPM, in a fixed shuffled order: what DDPMPipeline can do."""
    asks = [Ask(n, steps) for n, steps in itertools.product((1, 2, 3, 4), (20, 50, 100))]
    random.Random(0).shuffle(asks)
    return asks


def mixed_asks() -> list[Ask]:
    """The same sizes by DDPM and DDIM, a third of them guided."""
    kinds = itertools.product((1, 2, 3, 4), (20, 50, 100), ("ddpm", "ddim"), (1.0, 1.0, 2.0))
    asks = [Ask(n, steps, sampler, guidance) for n, steps, sampler, guidance in kinds]
    random.Random(0).shuffle(asks)
    return asks


async def send_to_tminus(client: httpx.AsyncClient, ask: Ask, seed: int) -> httpx.Response:
    """POST /sample with a JSON body."""
    body: dict[str, Any] = {"n": ask.n, "steps": ask.steps, "sampler": ask.sampler, "seed": seed}
    if ask.guidance != 1.0:
        body |= {"guidance": ask.guidance, "class_label": seed % 10}
    return await client.post("/sample", json=body)


async def send_to_lock(client: httpx.AsyncClient, ask: Ask, seed: int) -> httpx.Response:
    """POST /sample with a query; no sampler, no guidance."""
    assert ask.sampler == "ddpm"
    assert ask.guidance == 1.0
    return await client.post("/sample", params={"n": ask.n, "steps": ask.steps, "seed": seed})


async def read_tminus(client: httpx.AsyncClient) -> Counters:
    """Sum the counters of /metrics over their labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return Counters(
        row_steps=sums.get("tminus_row_steps_total", 0.0),
        places=sums["tminus_batch_rows_sum"],
        ticks=sums["tminus_batch_rows_count"],
        ticks_s=sums["tminus_step_duration_seconds_sum"],
        cpu_s=sums["process_cpu_seconds_total"],
        saved=sums["tminus_row_steps_saved_total"],
    )


async def read_lock(client: httpx.AsyncClient) -> Counters:
    """Ask the lock server's own count of forward passes."""
    passes = (await client.get("/passes")).json()
    return Counters(passes["row_steps"], passes["row_steps"], passes["ticks"], 0.0, passes["cpu_s"])


async def full_load(
    url: str, asks: Sequence[Ask], send: Send, read: Read, *, clients: int, warm_up_s: float, seconds: float
) -> Loaded:
    """Keep `clients` requests in flight, and measure by the server's counters over a window after the warm-up."""
    queue = enumerate(itertools.cycle(asks))
    in_flight: dict[int, Ask] = {}
    received: list[Ask] = []

    async def keep_asking(http: httpx.AsyncClient) -> None:
        for number, ask in queue:
            in_flight[number] = ask
            _check(await send(http, ask, number))
            received.append(in_flight.pop(number))

    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=limits, trust_env=False) as http:
        start = await read(http)
        loops = [asyncio.create_task(keep_asking(http)) for _ in range(clients)]
        try:
            await _run_for(warm_up_s, loops)
            before, before_s = await _read_timed(http, read)
            await _run_for(seconds, loops)
            after, after_s = await _read_timed(http, read)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
        end = await _settled(http, read)
    window_s = after_s - before_s
    window, whole = _minus(after, before), _minus(end, start)
    return Loaded(
        row_steps_per_s=window.row_steps / window_s,
        places_per_s=window.places / window_s,
        places_per_tick=window.places / max(1, window.ticks),
        share_in_ticks=window.ticks_s / window_s,
        cpu_s_per_place=window.cpu_s / max(1, window.places),
        answered=len(received),
        received_row_steps=sum(ask.row_steps for ask in received),
        abandoned_row_steps=sum(ask.row_steps for ask in in_flight.values()),
        counted=whole,
    )


async def idle_latencies(url: str, ask: Ask, send: Send, count: int) -> list[float]:
    """Seconds of `count` requests, one after the other, on a server that does nothing else."""
    seconds = []
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, trust_env=False) as http:
        for number in range(count):
            started = time.perf_counter()
            _check(await send(http, ask, number))
            seconds.append(time.perf_counter() - started)
    return seconds


def _check(response: httpx.Response) -> None:
    if response.status_code != 200 or not response.content.startswith(PNG_MAGIC):
        raise RuntimeError(f"{response.request.url}: {response.status_code} {response.text[:300]}")


async def _run_for(seconds: float, loops: Sequence["asyncio.Task[None]"]) -> None:
    """Let the clients run; a client only ends by failing, and then so does the load."""
    done, _ = await asyncio.wait(loops, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for loop in done:
        loop.result()


async def _read_timed(http: httpx.AsyncClient, read: Read) -> tuple[Counters, float]:
    """Counters, and the middle of the time in which they were read."""
    started = time.perf_counter()
    counters = await read(http)
    return counters, (started + time.perf_counter()) / 2


async def _settled(http: httpx.AsyncClient, read: Read) -> Counters:
    """Read until the server has given up what nobody waits for. One that gives up nothing is not waited for."""
    end = time.perf_counter() + SETTLE_S
    last = await read(http)
    while last.saved is not None and time.perf_counter() < end:
        await asyncio.sleep(0.5)
        now = await read(http)
        if (now.row_steps, now.saved) == (last.row_steps, last.saved):
            return now
        last = now
    return last


def _minus(after: Counters, before: Counters) -> Counters:
    return Counters(
        after.row_steps - before.row_steps,
        after.places - before.places,
        after.ticks - before.ticks,
        after.ticks_s - before.ticks_s,
        after.cpu_s - before.cpu_s,
        None if after.saved is None or before.saved is None else after.saved - before.saved,
    )
