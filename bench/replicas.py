"""Compare the waits of several servers on one PostgreSQL with those of the simulation.

    python -m bench.replicas [--replicas 1,2,3] [--seconds 300] [--load 0.6] [--quick 1]

Durable jobs come at random moments to servers of one thread each, and the same jobs at the same moments to the
simulation (bench/cluster.py), which is told how long ticks take, as jobs alone on an idle server show, times how much
longer all of the run took together. The network is a small one of random weights, so that some hundred jobs end in a
minute. PostgreSQL is Debian's, started for the run; each server has a cache of measurements of its own. Seconds are
those of arrivals for each number of servers; the load is the share of their cores. Writes bench/results/replicas.json:
waits, and those simulated over the real ones.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx
import torch

from bench import cluster, result_file, servers, traffic
from bench.figures import quantile
from bench.servers import Server
from tests import postgres
from tminus.model.checkpoint import Labels, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig
from tminus.service.work import Work

NETWORK = UNetConfig(
    sample_size=32, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=8,
)  # fmt: skip
TICKS = "tminus_tick_duration_seconds_sum"
PLACES, LENGTHS = (1, 2, 4, 8), (20, 320)  # rows and steps of the jobs that show how long ticks take
ONE_THREAD = ("--threads", "1", "--max-batch", "8")


def main() -> None:
    """Measure and print."""
    args = servers.options_of(__doc__, replicas="1,2,3", seconds=300.0, load=0.6, quick=0, out="")
    begun = result_file.begin(wait=not args.quick)
    seconds = 5.0 if args.quick else args.seconds
    with tempfile.TemporaryDirectory() as folder, postgres.running() as database:
        found = {
            f"{count}": predicted(Path(folder) / f"{count}", database.url(), count, seconds, args.load)
            for count in map(int, args.replicas.split(","))
        }
    result_file.write("replicas", begun.made(servers.describe(), quick=bool(args.quick)), found, args.out)


@contextmanager
def started(
    checkpoint: Path, place: Path, database: str, count: int, *flags: str, **more: str
) -> Iterator[list[Server]]:
    """Start so many servers of one namespace, one after the other: each measures its ticks on an idle machine.

    more: variables of theirs.
    """
    shared = {"TMINUS_JOB_STORE": database, "TMINUS_JOB_NAMESPACE": f"replicas_{place.name}"}
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = []
        for number in range(count):
            env = shared | more | {"XDG_CACHE_HOME": str(place / f"cache {number}")}
            server = Server(checkpoint, place / f"state {number}", flags, env, place / f"log {number}")
            server.start()
            stack.callback(server.kill)
            running.append(server)
        yield running


def predicted(place: Path, database: str, count: int, seconds: float, load: float) -> dict[str, float]:
    """Put the same load of jobs on so many servers and on the simulation; return how long both take."""
    checkpoint = place / "checkpoint"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_checkpoint(checkpoint, UNet2D(NETWORK).state_dict(), NETWORK, NoiseConfig(), Labels((), None), {})
    with started(checkpoint, place, database, count, *ONE_THREAD) as running:
        alone = [alone_of(running[0], rows) for rows in PLACES]
        share = load * min(1.0, (os.cpu_count() or 1) / count)
        points = [(rows, each.elapsed_s) for rows, each in zip(PLACES, alone, strict=True)]
        requests = list(traffic.at_rate(share * count * cluster.capacity_per_s(points), seconds))
        draw = random.Random(count)
        to = [draw.randrange(count) for _ in requests]
        before_s = sum(metric_now(server, TICKS) for server in running)
        waits, refused = asyncio.run(real(running, requests, to))
        ticks_s = sum(metric_now(server, TICKS) for server in running) - before_s
    # Ticks took longer than alone, as the servers share cores and memory. By how much, their sum says.
    slower, between = 1.0, statistics.mean(each.elapsed_s / each.tick_s for each in alone)
    for _ in range(3):  # slower ticks are fuller ones
        scaled = [(rows, slower * elapsed_s) for rows, elapsed_s in points]
        outcome = cluster.Cluster(count, points=scaled, cores=os.cpu_count()).run(requests, to=to)
        slower *= between * ticks_s / outcome.ticks_s
    beside_s = statistics.mean(each.beside_s for each in alone)
    told = [wait_s + beside_s for wait_s in outcome.waits()]
    halves, hundredths = ((quantile(waits, q), quantile(told, q)) for q in (0.5, 0.99))
    return {
        "jobs": len(waits),
        "refused": refused,
        "ticks_over_measured": slower,
        "median_s": halves[0],
        "median_simulated_s": halves[1],
        "median_ratio": halves[1] / halves[0],
        "p99_s": hundredths[0],
        "p99_simulated_s": hundredths[1],
        "p99_ratio": hundredths[1] / hundredths[0],
    }


@dataclass(frozen=True, slots=True)
class Alone:
    """How long a job of so many rows takes on an idle server."""

    tick_s: float  # as the server counts it
    elapsed_s: float  # with what comes between two ticks
    beside_s: float  # the job, beside its ticks


def alone_of(server: Server, rows: int) -> Alone:
    """Run jobs of so many rows, short and long ones, one after the other."""
    tick_s, took_s = [], []
    for steps in LENGTHS:
        before = metric_now(server, TICKS), metric_now(server, TICKS.replace("_sum", "_count"))
        one = [(0.0, Work(rows, steps, range(0)))]
        took_s.append(min(asyncio.run(real([server], one, [0]))[0][0] for _ in range(3)))
        ticks = metric_now(server, TICKS.replace("_sum", "_count")) - before[1]
        tick_s.append((metric_now(server, TICKS) - before[0]) / ticks)
    elapsed_s = (took_s[1] - took_s[0]) / (LENGTHS[1] - LENGTHS[0])
    return Alone(tick_s[1], elapsed_s, max(0.0, took_s[0] - LENGTHS[0] * elapsed_s))


async def real(
    running: Sequence[Server], requests: Sequence[tuple[float, Work]], to: Sequence[int]
) -> tuple[list[float], int]:
    """Post jobs at their times, each to its server; how long each took, and how many were refused."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        began_s = time.perf_counter()

        async def post(number: int) -> str | None:
            at_s, work = requests[number]
            await asyncio.sleep(began_s + at_s - time.perf_counter())
            body = {"n": work.rows, "steps": work.steps, "seed": number}
            answer = await http.post(f"{running[to[number]].url}/jobs", json=body)
            if answer.status_code == 429:
                return None
            return str(answer.raise_for_status().json()["id"])

        ids = await asyncio.gather(*map(post, range(len(requests))))
        waits = []
        for job_id in ids:
            while job_id is not None:
                job = (await http.get(f"{running[0].url}/jobs/{job_id}")).raise_for_status().json()
                if job["finished"] is not None:
                    assert job["state"] == "done", job
                    created, finished = (datetime.fromisoformat(job[name]) for name in ("created", "finished"))
                    waits.append((finished - created).total_seconds())
                    break
                await asyncio.sleep(0.2)
    return waits, ids.count(None)


def metric_now(server: Server, name: str) -> float:
    """Read a metric of a server, summed over its labels."""
    return servers.sum_metrics(httpx.get(f"{server.url}/metrics", trust_env=False).text).get(name, 0.0)


if __name__ == "__main__":
    main()
