"""kill -9, again and again, with jobs in flight: is any lost, doubled, or other than undisturbed?

    .venv/bin/python -m tests.trials.crash [--kills 50] [--jobs 20]

Each round brings the jobs in flight to --jobs, posts them with an Idempotency-Key each, kills the server at a random
moment (also while they are being posted) and starts it again; what was not answered is posted again with the same key.
At the end every job's PNG is compared with the one that POST /sample gives for the same parameters.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from bench import servers
from bench.servers import Server
from tminus.model.catalogue import SAMPLERS

LONGEST_S = 5.0  # from the first request of a round to the kill


def main() -> None:
    """Run, compare, print; exit with 1 if any promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        server = Server(args.checkpoint, Path(state))
        server.start()
        try:
            sys.exit(run(server, random.Random(args.seed), args.kills, args.jobs))
        finally:
            server.kill()


def run(server: Server, rng: random.Random, kills: int, count: int) -> int:
    """All of it; the exit code."""
    specs: dict[str, dict[str, Any]] = {}
    ids: dict[str, str] = {}
    in_flight_at_kill = []
    changed = 0
    for number in range(kills):
        in_flight = sum(job["state"] in ("waiting", "running") for job in all_jobs(server))
        for _ in range(count - in_flight):
            specs[f"job {len(specs)}"] = make_spec(rng, len(specs))
        killer = threading.Timer(rng.uniform(0.02, LONGEST_S), server.kill)
        killer.start()
        changed += post(server, specs, ids)
        killer.join()
        server.start()
        changed += post(server, specs, ids)
        in_flight_at_kill.append(sum(job["state"] in ("waiting", "running") for job in all_jobs(server)))
        print(f"kill {number + 1} of {kills}: {len(specs)} jobs, {in_flight_at_kill[-1]} go on", flush=True)
    while any(job["state"] in ("waiting", "running") for job in all_jobs(server)):
        time.sleep(0.2)
    listed = {job["id"]: job for job in all_jobs(server)}
    lost = [key for key, job_id in ids.items() if listed.get(job_id, {}).get("state") != "done"]
    doubled = len(listed) - len(ids)
    other = [key for key, job_id in ids.items() if key not in lost and not same(server, job_id, specs[key])]
    print("| what | |\n|---|---|")
    print(f"| kills; jobs accepted | {kills}; {len(ids)} |")
    print(f"| jobs in flight after a kill, mean | {sum(in_flight_at_kill) / kills:.1f} |")
    print(f"| lost, doubled, given another id | **{len(lost)}, {doubled}, {changed}** |")
    print(f"| byte-identical to an undisturbed run | **{len(ids) - len(lost) - len(other)} of {len(ids)}** |")
    return int(bool(lost or doubled or other or changed))


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


def post(server: Server, specs: dict[str, dict[str, Any]], ids: dict[str, str]) -> int:
    """Post every job, as far as the server lives; how many got another id than before."""
    changed = 0
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        for key, spec in specs.items():
            try:
                answer = http.post("/jobs", json=spec, headers={"Idempotency-Key": key})
            except httpx.TransportError:
                return changed
            job_id = answer.raise_for_status().json()["id"]
            changed += ids.setdefault(key, job_id) != job_id
    return changed


def all_jobs(server: Server) -> list[dict[str, Any]]:
    """Every job the server knows."""
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 200}
    while True:
        page = httpx.get(f"{server.url}/jobs", params=query, timeout=30, trust_env=False).raise_for_status().json()
        found += page["jobs"]
        if page["next"] is None:
            return found
        query["before"] = page["next"]


def same(server: Server, job_id: str, spec: dict[str, Any]) -> bool:
    """Whether a job's PNG is that of an undisturbed run."""
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http:
        image = http.get(f"/jobs/{job_id}/image").raise_for_status().content
        return http.post("/sample", json=spec).raise_for_status().content == image


if __name__ == "__main__":
    main()
