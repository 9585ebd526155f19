"""Three servers on one PostgreSQL: they are killed, put to sleep and cut off, and the database is restarted.

    .venv/bin/python -m tests.trials.replicas [--kills 50] [--sleeps 5] [--cuts 5] [--restarts 5] [--jobs 20]
    .venv/bin/python -m tests.trials.replicas --replicas 1

Each round brings the jobs in flight to --jobs, posted to any server that lives with an Idempotency-Key each, and does
one thing to one server, or to the database, at a random moment; a server is also killed while they are being posted. In
the end every job is done, once, and has the bytes that POST /sample gives for the same parameters. Between each server
and the database is a forwarder that can be cut: what is sent then waits, as on a broken line.

One server alone has its jobs in SQLite, and is killed only.
"""

import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from bench import servers
from bench.servers import Server
from tests import postgres
from tests.trials.claims import Claim, least, most, none, report
from tminus.model.catalogue import SAMPLERS

LEASE_S = 3.0
PATIENCE_S = 600.0
MOMENT_S = 3.0  # the latest after the jobs were posted
TAKEN_S = 2.0  # after the lease of a server that is gone, until another steps the first of its jobs


class Line:
    """Forwards one port to another, until it is cut. Runs in a thread of its own."""

    def __init__(self, to_port: int) -> None:
        self.port, self._to_port = postgres.free_port(), to_port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._whole, self._ended = asyncio.Event(), asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._listening.wait(10)

    def cut(self) -> None:
        """Pass nothing on."""
        self._call(self._whole.clear)

    def heal(self) -> None:
        """Pass on what waits, and all that comes."""
        self._call(self._whole.set)

    def close(self) -> None:
        self._call(self._ended.set)
        self._thread.join()

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._whole.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self._listening.set()
        await self._ended.wait()
        server.close()  # and the connections end with the loop

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task that is cancelled raises in start_server's own callback.
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.CancelledError):
            await self._whole.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, far_writer))
                both.create_task(self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()


class Cluster:
    """The database, the servers, and the jobs that they were asked for."""

    def __init__(self, database: postgres.Postgres | None, checkpoint: Path, folder: Path, count: int) -> None:
        """database: None: one server, which has its jobs in SQLite."""
        self.database = database
        self.lines = [Line(database.port) for _ in range(count)] if database is not None else []
        stores = [{"TMINUS_JOB_STORE": f"postgresql://tminus@127.0.0.1:{line.port}/postgres"} for line in self.lines]
        flags = ("--job-lease-s", str(LEASE_S)) if stores else ()
        self.servers = [
            Server(checkpoint, folder / str(number), flags, store) for number, store in enumerate(stores or [{}])
        ]
        self.specs: dict[str, dict[str, Any]] = {}
        self.ids: dict[str, str] = {}
        self.changed = 0  # answers with another id than before
        self.taken_s: list[float] = []

    def ask(self, server: Server, path: str) -> httpx.Response:
        return httpx.get(f"{server.url}{path}", trust_env=False, timeout=60)

    def open_ids(self, server: Server) -> set[str]:
        """The jobs that have not ended, as one server tells it."""
        return {job["id"] for job in jobs_of(server, "waiting,running")}

    def post(self, draw: random.Random, living: list[Server], *, again: bool = False) -> None:
        """Post every job whose answer is not known, or every one again, each to a server that lives."""
        for key in [key for key in self.specs if again or key not in self.ids]:
            server = draw.choice(living)
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(
                    f"{server.url}/jobs", json=self.specs[key], headers={"Idempotency-Key": key}, trust_env=False,
                    timeout=60,
                )  # fmt: skip
                if answer.status_code == 202:
                    self.changed += self.ids.setdefault(key, answer.json()["id"]) != answer.json()["id"]
                else:
                    assert answer.status_code in (503, 507), answer.text

    def add_specs(self, draw: random.Random, jobs: int) -> None:
        """Have as many jobs to post as bring those in flight to so many."""
        for _ in range(jobs - len(self.open_ids(self.servers[0]))):
            self.specs[f"job {len(self.specs)}"] = make_spec(draw, len(self.specs))

    def held_by(self, server: Server) -> set[str]:
        """Jobs that a server has in its worker: it alone knows when they will be done."""
        return {job["id"] for job in jobs_of(server, "waiting,running") if job["eta_s"] is not None}

    def close(self) -> None:
        for line in self.lines:
            line.heal()
        for server in self.servers:
            with contextlib.suppress(AssertionError):
                server.kill()
        for line in self.lines:
            line.close()


def make_spec(rng: random.Random, seed: int) -> dict[str, Any]:
    """A job of a second or so, of any kind."""
    return {
        "n": rng.randint(1, 4),
        "steps": rng.choice([20, 50, 100, 200]),
        "sampler": rng.choice(SAMPLERS),
        "seed": seed,
        "class_label": rng.randrange(10),
        "guidance": rng.choice([1, 2]),
    }


def jobs_of(server: Server, state: str | None = None) -> list[dict[str, Any]]:
    """Every job that a server knows, or those in a state."""
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 100} | ({} if state is None else {"state": state})
    while True:
        page = httpx.get(f"{server.url}/jobs", params=query, timeout=60, trust_env=False).raise_for_status().json()
        found += page["jobs"]
        if page["next"] is None:
            return found
        query["before"] = page["next"]


# --- what is done to them ---


def kill(cluster: Cluster, draw: random.Random) -> None:
    """SIGKILL, perhaps while jobs are being posted; when another has one of its jobs, it is started again."""
    victim, held = draw.choice(cluster.servers), set[str]()
    others = [server for server in cluster.servers if server is not victim]

    def strike() -> None:
        if others:
            held.update(cluster.held_by(victim))
        victim.kill()

    timer = threading.Timer(draw.uniform(0.02, MOMENT_S), strike)
    timer.start()
    cluster.post(draw, cluster.servers)
    timer.join()
    began_s = time.monotonic()
    if others:
        cluster.post(draw, others)
    while others and (left := held & cluster.open_ids(others[0])):
        if left & set().union(*(cluster.held_by(server) for server in others)):
            cluster.taken_s.append(time.monotonic() - began_s)
            break
        assert time.monotonic() - began_s < PATIENCE_S
        time.sleep(0.05)
    victim.start()
    cluster.post(draw, cluster.servers)


def post_and_wait(cluster: Cluster, draw: random.Random) -> None:
    cluster.post(draw, cluster.servers)
    time.sleep(draw.uniform(0.02, MOMENT_S))


def sleep(cluster: Cluster, draw: random.Random) -> None:
    """SIGSTOP past the lease, then SIGCONT."""
    victim = draw.choice(cluster.servers)
    post_and_wait(cluster, draw)
    assert victim.process is not None
    victim.process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_S + TAKEN_S)
    victim.process.send_signal(signal.SIGCONT)


def cut(cluster: Cluster, draw: random.Random) -> None:
    """The line between a server and the database, for longer than a lease."""
    line = draw.choice(cluster.lines)
    post_and_wait(cluster, draw)
    line.cut()
    time.sleep(LEASE_S + TAKEN_S)
    line.heal()


def restart(cluster: Cluster, draw: random.Random) -> None:
    """The database crashes, and is there again after more than a lease."""
    assert cluster.database is not None
    post_and_wait(cluster, draw)
    cluster.database.stop("KILL")
    time.sleep(draw.uniform(0.0, LEASE_S + TAKEN_S))
    cluster.database.start()


FAULTS = {"kill -9": kill, "asleep past the lease": sleep, "cut off": cut, "the database crashes": restart}


# --- the trial ---


@contextlib.contextmanager
def running(checkpoint: Path, count: int) -> Iterator[Cluster]:
    alone = contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, postgres.running() if count > 1 else alone as database:
        cluster = Cluster(database, checkpoint, Path(folder), count)
        try:
            for server in cluster.servers:
                server.start()
            yield cluster
        finally:
            cluster.close()


def trial(checkpoint: Path, times: dict[str, int], jobs: int, seed: int = 0, count: int = 3) -> list[Claim]:
    """Run it; what was found. times: how often each fault."""
    draw = random.Random(seed)
    rounds = [name for name, often in times.items() for _ in range(often)]
    draw.shuffle(rounds)
    with running(checkpoint, count) as cluster:
        done = 0
        with contextlib.suppress(KeyboardInterrupt):  # then what was done so far is judged
            for name in rounds:
                settle(cluster)
                cluster.add_specs(draw, jobs)
                FAULTS[name](cluster, draw)
                done += 1
                print(f"{done} of {len(rounds)}, {name}: {len(cluster.ids)} jobs accepted", flush=True)
        settle(cluster)
        cluster.post(draw, cluster.servers, again=True)
        until_s = time.monotonic() + PATIENCE_S
        while cluster.open_ids(cluster.servers[0]):
            assert time.monotonic() < until_s, "jobs do not end"
            time.sleep(0.2)
        return judge(cluster, done)


def settle(cluster: Cluster) -> None:
    """Wait until every server answers, with its store."""
    until_s = time.monotonic() + PATIENCE_S
    for server in cluster.servers:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if {cluster.ask(server, path).status_code for path in ("/readyz", "/jobs")} == {200}:
                    break
            assert time.monotonic() < until_s, f"{server.url} is not ready again"
            time.sleep(0.1)


def judge(cluster: Cluster, faults: int) -> list[Claim]:
    first, last = cluster.servers[0], cluster.servers[-1]
    lost, other = [], []
    for key, job_id in cluster.ids.items():
        if cluster.ask(first, f"/jobs/{job_id}").json().get("state") != "done":
            lost.append(key)
            continue
        images = {cluster.ask(server, f"/jobs/{job_id}/image").content for server in cluster.servers}
        undisturbed = httpx.post(f"{last.url}/sample", json=cluster.specs[key], trust_env=False, timeout=300)
        if images != {undisturbed.content}:
            other.append(key)
    total = len(cluster.ids)
    claims = [
        none("accepted jobs that were lost", len(lost), total),
        none("jobs kept twice, or under another id", abs(len(jobs_of(first)) - total) + cluster.changed, total),
        none("jobs whose bytes at any server are not those of an undisturbed run", len(other), total),
    ]
    if cluster.database is not None:
        engine = sa.create_engine(cluster.database.url().replace("postgresql", "postgresql+psycopg"))
        with engine.begin() as connection:
            moved = connection.execute(sa.text("SELECT count(*) FROM tminus.jobs WHERE fence > 1")).scalar_one()
        engine.dispose()
        claims.append(least("jobs that another server took over", moved, min(1, faults), form=",d"))
    if cluster.taken_s:
        print(f"\n{len(cluster.taken_s)} times others took over what a killed server held.")
        limit_s = LEASE_S + TAKEN_S
        claims.append(most("from a death to steps of one of its jobs elsewhere", max(cluster.taken_s), limit_s, " s"))
    return claims


if __name__ == "__main__":
    asked = servers.options_of(
        __doc__, checkpoint=servers.CHECKPOINT, kills=50, sleeps=5, cuts=5, restarts=5, jobs=20, replicas=3, seed=0
    )
    times = dict(zip(FAULTS, (asked.kills, asked.sleeps, asked.cuts, asked.restarts), strict=True))
    if asked.replicas == 1:
        times = {"kill -9": asked.kills}
    sys.exit(report(trial(asked.checkpoint, times, asked.jobs, asked.seed, asked.replicas)))
