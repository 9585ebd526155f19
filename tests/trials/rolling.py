"""Two servers on one PostgreSQL behind nginx are restarted in turn, three times, under load: no request fails.

    .venv/bin/python -m tests.trials.rolling [--rounds 3]

nginx is a real one, by docker/nginx/tminus.conf.template. The clients keep their connections to it and ask all the
time: POST and GET /sample, GET /model, WebSockets with previews, and durable jobs by our own client. Meanwhile
server A gets SIGTERM, ends, and is started again; then B.
"""

import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from bench import servers
from bench.servers import Server
from tests import postgres
from tests.e2e.nginx import TEMPLATE, filled, nginx
from tests.trials.claims import Claim, least, none, report
from tminus.service.client import AsyncClient, ClientError

SETTLED_S = 0.5  # between a server that is ready and the restart of the other
PATIENCE_S = 300.0
BROKEN = re.compile(r"(connect\(\) failed|prematurely closed|reset by peer|[Bb]roken pipe)")
STREAMS, JOBS = 2, 2  # clients of each kind, besides the plain ones
Ask = Callable[[httpx.AsyncClient, random.Random], Awaitable[httpx.Response]]


@dataclass
class Seen:
    """What the clients got."""

    good: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def note(self, kind: str, failure: str = "") -> None:
        if failure:
            self.failed.append(f"{kind}: {failure}")
        else:
            self.good[kind] += 1


@contextlib.contextmanager
def behind_nginx(folder: Path, ports: tuple[int, int]) -> Iterator[str]:
    """An nginx in front of two servers on these ports; its URL."""
    port = servers.free_port()
    text = re.sub(r"ssl_certificate\S* .*;", "", TEMPLATE.read_text())  # tests/e2e/test_proxy.py has it with TLS
    changes = {"listen 8443 ssl": f"listen 127.0.0.1:{port}", "server_name ${NAME}": "server_name _"}
    text = filled(text, changes | {"tminus:8000": "tminus"})
    each = "".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)  # as docs/production.md has it
    with nginx(folder, f"upstream tminus {{ {each} keepalive 32; }}\n{text}"):
        yield f"http://127.0.0.1:{port}"


# --- clients, each of which asks again as soon as it has its answer ---


async def post(http: httpx.AsyncClient, draw: random.Random) -> httpx.Response:
    spec = {"n": draw.choice((1, 1, 2, 4)), "steps": draw.choice((2, 5, 20)), "seed": draw.getrandbits(32)}
    return await http.post("/sample", json=spec)


async def get(http: httpx.AsyncClient, draw: random.Random) -> httpx.Response:
    return await http.get("/sample", params={"steps": draw.choice((2, 10)), "seed": draw.getrandbits(32)})


async def model(http: httpx.AsyncClient, draw: random.Random) -> httpx.Response:
    await asyncio.sleep(draw.uniform(0, 0.2))
    return await http.get("/model")


PLAIN: tuple[tuple[str, Ask], ...] = (
    (("POST /sample", post),) * 4 + (("GET /sample", get),) * 2 + (("GET /model", model),)
)


async def plain(url: str, kind: str, ask: Ask, draw: random.Random, seen: Seen, over: asyncio.Event) -> None:
    """One connection, which is kept."""
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False) as http:
        while not over.is_set():
            try:
                answer = await ask(http, draw)
            except httpx.HTTPError as error:
                seen.note(kind, repr(error))
            else:
                seen.note(kind, "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}")


async def streaming(url: str, draw: random.Random, seen: Seen, over: asyncio.Event) -> None:
    """A WebSocket a job, whose previews come until it is done."""
    while not over.is_set():
        last = "nothing"
        try:
            async with asyncio.timeout(PATIENCE_S), connect(url.replace("http", "ws") + "/sample/stream") as ws:
                await ws.send(
                    json.dumps({"n": 2, "steps": draw.choice((20, 100)), "seed": draw.getrandbits(32), "every": 5})
                )
                async for message in ws:
                    last = json.loads(message)["type"] if isinstance(message, str) else last
        except (OSError, WebSocketException) as error:
            last = f"{last}, then {error!r}"
        seen.note("stream", "" if last == "done" else last)


async def submitting(url: str, draw: random.Random, seen: Seen, over: asyncio.Event) -> None:
    """Durable jobs one after the other, each waited for and fetched, as a program with our client does it."""
    async with AsyncClient(url, patience_s=PATIENCE_S) as client:
        while not over.is_set():
            try:
                job = await client.submit(n=2, steps=draw.choice((20, 200)), seed=draw.getrandbits(32))
                state = (await job.wait(PATIENCE_S)).state
                await job.image()
            except (ClientError, TimeoutError) as error:
                state = repr(error)
            seen.note("durable job", "" if state == "done" else state)


# --- the trial ---


def restart(server: Server) -> tuple[int, float]:
    """SIGTERM, wait for the end, start again, wait until it is ready; its exit code, and how long it was away."""
    began_s = time.monotonic()
    status = server.terminate()
    server.start()
    return status, time.monotonic() - began_s


async def run(url: str, pair: tuple[Server, Server], rounds: int, seed: int) -> tuple[Seen, list[int], list[float]]:
    """Restart each server so many times under load; what the clients saw, exit codes, and seconds away."""
    seen, over, codes, away_s = Seen(), asyncio.Event(), list[int](), list[float]()
    draws = (random.Random(f"{seed} {number}") for number in range(100))
    clients = [plain(url, kind, ask, next(draws), seen, over) for kind, ask in PLAIN]
    clients += [streaming(url, next(draws), seen, over) for _ in range(STREAMS)]
    clients += [submitting(url, next(draws), seen, over) for _ in range(JOBS)]
    tasks = [asyncio.create_task(client) for client in clients]
    for _ in range(rounds):
        for server in pair:
            await asyncio.sleep(SETTLED_S)
            code, seconds = await asyncio.to_thread(restart, server)
            codes.append(code)
            away_s.append(seconds)
    await asyncio.sleep(SETTLED_S)
    over.set()
    await asyncio.gather(*tasks)
    return seen, codes, away_s


def trial(checkpoint: Path, rounds: int, seed: int = 0, flags: Sequence[str] = ()) -> list[Claim]:
    """Run it; what was found. flags: of both servers."""
    with tempfile.TemporaryDirectory() as place, postgres.running() as database:
        folder = Path(place)
        env = {"TMINUS_JOB_STORE": database.url()}
        one, other = (Server(checkpoint, folder / name, flags, env) for name in ("a", "b"))
        started: list[Server] = []
        try:
            for server in (one, other):
                server.start()
                started.append(server)
            with behind_nginx(folder, (one.port, other.port)) as url:
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                            break
                    time.sleep(0.02)
                seen, codes, away_s = asyncio.run(run(url, (one, other), rounds, seed))
                log = (folder / "errors").read_text()
        finally:
            for server in started:
                server.kill()
    print(*seen.failed[:20], sep="\n")
    answered = sum(seen.good.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.good.items()))
    print(f"{answered:,} answered: {kinds}. A server was away for {max(away_s):.1f} s at most.")
    broken = Counter(BROKEN.findall(log))
    print(f"What nginx passed on because a connection failed: {dict(broken) or 'nothing'}.\n")
    return [
        none("requests that failed", len(seen.failed), answered + len(seen.failed)),
        none("restarts that ended in another exit code than 0", sum(map(bool, codes)), len(codes)),
        least("kinds of client that were served", len(seen.good), 5, form="d"),
    ]


if __name__ == "__main__":
    asked = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, rounds=3, seed=0)
    sys.exit(report(trial(asked.checkpoint, asked.rounds, asked.seed)))
