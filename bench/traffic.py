"""Traffic for bench/cluster.py: at random, or as it was at a server.

    python -m bench.traffic http://localhost:8000 > traffic.csv

writes down the durable jobs that a server still knows, each with when it came and how large it was. TMINUS_KEY is sent
as the key: an admin's, or only that key's own jobs are listed.
"""

import csv
import os
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import httpx

from tminus.service.work import Work

MIX = {20: 80, 50: 15, 1000: 5}  # steps, and how many of a hundred jobs have them
ROWS = 2
MEAN_PLACES = ROWS * sum(steps * share for steps, share in MIX.items()) / sum(MIX.values())
COLUMNS = ("at_s", "images", "steps", "guided")

Requests = Sequence[tuple[float, Work]]


def at_rate(per_s: float, seconds: float, seed: int = 0) -> Iterator[tuple[float, Work]]:
    """Draw jobs of the mix at random moments, so many a second on average (a Poisson process)."""
    draw, time_s = random.Random(seed), 0.0
    while (time_s := time_s + draw.expovariate(per_s)) < seconds:
        yield time_s, work(ROWS, draw.choices([*MIX], [*MIX.values()])[0])


def deaths(replicas: int, seconds: float, per_hour: float, seed: int = 0) -> Iterator[tuple[float, int]]:
    """Draw when which replica dies: at random moments, so many an hour for each."""
    draw, time_s = random.Random(f"deaths {seed}"), 0.0
    while per_hour and (time_s := time_s + draw.expovariate(per_hour * replicas / 3600)) < seconds:
        yield time_s, draw.randrange(replicas)


def work(images: int, steps: int, *, guided: bool = False) -> Work:
    """Return the work of a job. A guided step takes two places."""
    return Work(images, steps, range(steps) if guided else range(0))


def read(file: Path) -> Requests:
    """Read what `record` has written."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        (float(row["at_s"]), work(int(row["images"]), int(row["steps"]), guided=row["guided"] == "1")) for row in rows
    ]


def record(url: str) -> Iterator[tuple[str, ...]]:
    """List the durable jobs of a server as rows of COLUMNS, in order of arrival."""
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("TMINUS_KEY")) else {}
    jobs, before = [], ""
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        while True:
            page = http.get(f"/jobs?limit=100{before}").raise_for_status().json()
            jobs += [job for job in page["jobs"] if job["durable"]]
            if page["next"] is None:
                break
            before = f"&before={page['next']}"
    came_s = [datetime.fromisoformat(job["created"]).timestamp() for job in jobs]
    for at_s, job in sorted(zip(came_s, jobs, strict=True), key=lambda pair: pair[0]):
        guided = job["parameters"].get("guidance", 1) != 1
        yield f"{at_s - min(came_s):.3f}", str(job["n"]), str(job["steps"]), str(int(guided))


def main() -> None:
    """Write a server's traffic to the output."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.traffic URL > FILE")
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    writer.writerows(record(sys.argv[1]))


if __name__ == "__main__":
    main()
