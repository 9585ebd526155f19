"""Three servers on one PostgreSQL: they are killed, put to sleep and cut off, and the database is restarted.

    .venv/bin/python -m tests.trials.replicas [--kills 50] [--sleeps 5] [--cuts 5] [--restarts 5] [--jobs 20]

Each round brings the jobs in flight to --jobs, posted to any server that lives with an Idempotency-Key each, and does
one thing to one server, or to the database, at a random moment. In the end every job is done, once, and has the bytes
that POST /sample gives for the same parameters. Between each server and the database is a forwarder that can be cut:
what is sent then waits, as on a broken line.
"""

import argparse
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
from tests.trials.crash import make_spec

LEASE_S = 3.0
OPEN = ("waiting", "running")
PATIENCE_S = 600.0
MOMENT_S = 3.0  # the latest after the jobs were posted
TAKEN_S = 2.0  # after the lease of a server that is gone, until another steps its jobs


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

    def __init__(self, database: postgres.Postgres, checkpoint: Path, folder: Path, count: int) -> None:
        self.database = database
        self.lines = [Line(database.port) for _ in range(count)]
        self.servers = [
            Server(checkpoint, folder / str(number), ("--job-lease-s", str(LEASE_S)), self._environment(line))
            for number, line in enumerate(self.lines)
        ]
        self.specs: dict[str, dict[str, Any]] = {}
        self.ids: dict[str, str] = {}
        self.changed = 0  # answers with another id than before
        self.taken_s: list[float] = []

    @staticmethod
    def _environment(line: Line) -> dict[str, str]:
        return {"TMINUS_JOB_STORE": f"postgresql://tminus@127.0.0.1:{line.port}/postgres"}

    def ask(self, server: Server, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(f"{server.url}{path}", trust_env=False, timeout=60, **kwargs)

    def open_ids(self, server: Server) -> set[str]:
        """The jobs that have not ended, as one server tells it."""
        found, query = set[str](), "state=waiting,running&limit=100"
        page: dict[str, Any] = {"next": ""}
        while page["next"] is not None:
            before = f"&before={page['next']}" if page["next"] else ""
            page = self.ask(server, f"/jobs?{query}{before}").raise_for_status().json()
            found |= {job["id"] for job in page["jobs"]}
        return found

    def post(self, draw: random.Random, living: list[Server]) -> None:
        """Post every job whose answer is not known, each to a server that lives."""
        for key in [key for key in self.specs if key not in self.ids]:
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

    def fill(self, draw: random.Random, jobs: int) -> None:
        """Bring the jobs in flight to so many."""
        for _ in range(jobs - len(self.open_ids(self.servers[0]))):
            self.specs[f"job {len(self.specs)}"] = make_spec(draw, len(self.specs))
        self.post(draw, self.servers)

    def held_by(self, server: Server) -> set[str]:
        """Jobs that a server has in its worker: it alone knows when they will be done."""
        jobs = self.ask(server, "/jobs?state=waiting,running&limit=100").json()["jobs"]
        return {job["id"] for job in jobs if job["eta_s"] is not None}

    def close(self) -> None:
        for line in self.lines:
            line.heal()
        for server in self.servers:
            with contextlib.suppress(AssertionError):
                server.kill()
        for line in self.lines:
            line.close()


# --- what is done to them ---


def kill(cluster: Cluster, draw: random.Random) -> None:
    """SIGKILL; when the others have its jobs, it is started again."""
    victim = draw.choice(cluster.servers)
    others = [server for server in cluster.servers if server is not victim]
    time.sleep(draw.uniform(0.02, MOMENT_S))
    held = cluster.held_by(victim)
    victim.kill()
    began_s = time.monotonic()
    cluster.post(draw, others)
    while left := held & cluster.open_ids(others[0]):
        if left <= set().union(*(cluster.held_by(server) for server in others)):
            cluster.taken_s.append(time.monotonic() - began_s)
            break
        assert time.monotonic() - began_s < PATIENCE_S
        time.sleep(0.05)
    victim.start()


def sleep(cluster: Cluster, draw: random.Random) -> None:
    """SIGSTOP past the lease, then SIGCONT."""
    victim = draw.choice(cluster.servers)
    time.sleep(draw.uniform(0.02, MOMENT_S))
    assert victim._process is not None
    victim._process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_S + TAKEN_S)
    victim._process.send_signal(signal.SIGCONT)


def cut(cluster: Cluster, draw: random.Random) -> None:
    """The line between a server and the database, for longer than a lease."""
    line = draw.choice(cluster.lines)
    time.sleep(draw.uniform(0.02, MOMENT_S))
    line.cut()
    time.sleep(LEASE_S + TAKEN_S)
    line.heal()


def restart(cluster: Cluster, draw: random.Random) -> None:
    """The database crashes, and is there again after more than a lease."""
    time.sleep(draw.uniform(0.02, MOMENT_S))
    cluster.database.stop("KILL")
    time.sleep(draw.uniform(0.0, LEASE_S + TAKEN_S))
    cluster.database.start()


FAULTS = {"kill -9": kill, "asleep past the lease": sleep, "cut off": cut, "the database crashes": restart}


# --- the trial ---


@contextlib.contextmanager
def running(checkpoint: Path, count: int) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder, postgres.running() as database:
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
                cluster.fill(draw, jobs)
                FAULTS[name](cluster, draw)
                done += 1
                print(f"{done} of {len(rounds)}, {name}: {len(cluster.ids)} jobs accepted", flush=True)
        settle(cluster)
        cluster.post(draw, cluster.servers)
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
    first, *others = cluster.servers
    lost, other = [], []
    for key, job_id in cluster.ids.items():
        if cluster.ask(first, f"/jobs/{job_id}").json().get("state") != "done":
            lost.append(key)
            continue
        images = {cluster.ask(server, f"/jobs/{job_id}/image").content for server in cluster.servers}
        undisturbed = httpx.post(f"{others[0].url}/sample", json=cluster.specs[key], trust_env=False, timeout=300)
        if images != {undisturbed.content}:
            other.append(key)
    engine = sa.create_engine(cluster.database.url().replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        kept = connection.execute(sa.text("SELECT count(*) FROM tminus.jobs")).scalar_one()
        moved = connection.execute(sa.text("SELECT count(*) FROM tminus.jobs WHERE fence > 1")).scalar_one()
    engine.dispose()
    total = len(cluster.ids)
    claims = [
        none("accepted jobs that were lost", len(lost), total),
        none("jobs kept twice, or under another id", abs(kept - total) + cluster.changed, total),
        none("jobs whose bytes at any server are not those of an undisturbed run", len(other), total),
        least("jobs that another server took over", moved, min(1, faults), form=",d"),
    ]
    if cluster.taken_s:
        print(f"\n{len(cluster.taken_s)} times others took over what a killed server held.")
        limit_s = LEASE_S + TAKEN_S
        claims.append(most("from a death to steps of its jobs elsewhere", max(cluster.taken_s), limit_s, " s"))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    for name, often in (("kills", 50), ("sleeps", 5), ("cuts", 5), ("restarts", 5)):
        parser.add_argument(f"--{name}", type=int, default=often)
    parser.add_argument("--jobs", type=int, default=20, help="in flight")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    times = dict(zip(FAULTS, (asked.kills, asked.sleeps, asked.cuts, asked.restarts), strict=True))
    sys.exit(report(trial(asked.checkpoint, times, asked.jobs, asked.seed, asked.replicas)))


if __name__ == "__main__":
    main()
