"""The client: it starts each request at its own time, whether the earlier ones are answered or not."""

import asyncio
import io
import resource
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import httpx
from PIL import Image

from bench.records import Answer, Arrival, Outcome

MOST_OUTSTANDING = 2000
SPARE_FILES = 256


def open_client(*urls: str) -> httpx.AsyncClient:
    """Make a client without a timeout of its own: every load is bounded as a whole, and its requests with it.

    Of several URLs, each request of images goes to the next one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OUTSTANDING + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(hard, wanted)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    limits = httpx.Limits(max_connections=MOST_OUTSTANDING, max_keepalive_connections=64)
    # Otherwise a peer compresses the PNG once more.
    headers = {"Accept": "image/png", "Accept-Encoding": "identity"}
    client = httpx.AsyncClient(base_url=urls[0], timeout=None, limits=limits, headers=headers, trust_env=False)
    turns = cycle(map(httpx.URL, urls))

    async def take_turn(request: httpx.Request) -> None:
        if request.method == "POST":
            request.url = request.url.copy_with(port=next(turns).port)

    client.event_hooks = {"request": [take_turn]} if len(urls) > 1 else {}
    return client


async def drive(
    http: httpx.AsyncClient,
    arrivals: Sequence[Arrival],
    *,
    drain_s: float,
    most_outstanding: int = MOST_OUTSTANDING,
) -> list[Answer]:
    """Send every arrival at its time, wait `drain_s` after the last one, and give up what has no answer then.

    An arrival that finds `most_outstanding` others waiting is not sent: its answer is "unsent".
    """
    clock = asyncio.get_running_loop().time
    start_s = clock()
    unsent: list[Answer] = []
    sent: dict[asyncio.Task[Answer], Arrival] = {}
    waiting: set[asyncio.Task[Answer]] = set()
    try:
        for arrival in arrivals:
            await asyncio.sleep(start_s + arrival.at_s - clock())
            if len(waiting) >= most_outstanding:
                unsent.append(_answer(arrival, "unsent", 0.0))
                continue
            task = asyncio.create_task(ask_for(http, arrival, start_s))
            sent[task] = arrival
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        if waiting:
            await asyncio.wait(set(waiting), timeout=drain_s)
    finally:
        given_up_s = clock() - start_s
        left = list(waiting)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    answers = [
        _answer(arrival, "unanswered", given_up_s - arrival.at_s) if task.cancelled() else task.result()
        for task, arrival in sent.items()
    ]
    return sorted(answers + unsent, key=lambda answer: answer.at_s)


async def ask_for(http: httpx.AsyncClient, arrival: Arrival, start_s: float) -> Answer:
    """Send one request and see what becomes of it; a client that leaves closes its connection."""
    clock = asyncio.get_running_loop().time
    due_s = start_s + arrival.at_s
    outcome: Outcome = "failed"
    response = None
    try:
        async with asyncio.timeout(arrival.leaves_after_s):
            response = await http.post("/sample", json=arrival.ask.to_body(arrival.seed))
    except TimeoutError:
        outcome = "left"
    except httpx.HTTPError:
        pass
    waited_s = clock() - due_s
    if response is None:
        return _answer(arrival, outcome, waited_s)
    if response.status_code != 200:
        return _answer(arrival, "refused" if response.status_code == 429 else "failed", waited_s)
    try:
        Image.open(io.BytesIO(response.content)).close()
    except OSError:  # no picture
        return _answer(arrival, "failed", waited_s)
    return _answer(arrival, "ok", waited_s)


@asynccontextmanager
async def meanwhile(*clients: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run clients beside the block. At its end they are cancelled, with the requests that they wait for."""
    tasks = [asyncio.create_task(client) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _answer(arrival: Arrival, outcome: Outcome, waited_s: float) -> Answer:
    return Answer(arrival.at_s, arrival.ask.n, arrival.ask.steps, arrival.seed, outcome, waited_s)
