"""Ten models on a budget of three, loaded when they are asked for: failures, waits, memory, and the ticks of others.

    python -m bench.demand [--network cifar] [--requests 100] [--loads 8]

First some clients ask for models in random order. Then one client asks one model without pause while others are
loaded: how long its ticks take meanwhile, and how long it waits between two, beside what both are otherwise.
"""

import asyncio
import itertools
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from bench import networks, servers
from bench.figures import quantile
from bench.models import SECRET, replace_weights, resident_bytes, ticks_in
from tminus.model.checkpoint import needs_of
from tminus.service.access.keys import Key, digest_of, to_line

MODELS, FITTING, CLIENTS = 10, 3, 4
ASK = {"n": 1, "steps": 3, "sampler": "ddim"}
LONG = {"n": 1, "steps": 100, "sampler": "ddim"}
QUIET_S = 10.0


def main() -> None:
    """Measure and print."""
    args = servers.options_of(__doc__, network="cifar", requests=100, loads=8)
    with tempfile.TemporaryDirectory() as folder:
        models, ticks = Path(folder) / "models", Path(folder) / "ticks"
        first = networks.write(args.network, Path(folder))
        for k in range(MODELS):
            shutil.copytree(first, models / f"m{k}")
            for _ in range(k):
                replace_weights(models / f"m{k}")
        needs = needs_of(first)
        budget_gb = (FITTING + 0.5) * needs.serving_bytes / 2**30
        flags = ("--models", str(models), "--idle-unload", "1h", "--models-memory-gb", f"{budget_gb:.6f}", "--open")
        command = ("bench.models", "--serve", str(ticks), *servers.contenders(1)["tminus"].command[2:], *flags)
        admin = to_line(Key("bench", "admin", digest_of(SECRET)))
        tminus = servers.Contender("tminus", "tminus", command, is_peer=False, env={"TMINUS_KEYS": admin})
        print(
            f"{MODELS} models of {needs.num_parameters / 1e6:.1f} M parameters, each counted as "
            f"{needs.serving_bytes / 2**20:.0f} MiB, on a budget of {FITTING}\n"
        )
        with servers.running(tminus, first, None) as server:
            asyncio.run(measure(server, ticks, args.requests, args.loads))


async def measure(server: servers.Running, ticks: Path, requests: int, loads: int) -> None:
    """Requests in random order, then loads beside the ticks of one model."""
    headers = {"Authorization": f"Bearer {SECRET}", "Accept": "image/png"}
    async with httpx.AsyncClient(base_url=server.url, timeout=None, headers=headers) as http:
        memory = [resident_bytes(server.pid)]
        asked = random.Random(1).choices(range(MODELS), k=requests)
        waits, failed = list[float](), list[str]()

        async def client() -> None:
            while asked:
                name, began_s = f"m{asked.pop()}", time.monotonic()
                answer = await http.post(f"/models/{name}/sample", json=ASK)
                waits.append(time.monotonic() - began_s)
                if answer.status_code != 200:
                    failed.append(f"{answer.status_code} {answer.text[:200]}")
                memory.append(resident_bytes(server.pid))

        began_s = time.monotonic()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        print("| | |\n|---|---|")
        print(f"| requests answered, failed | **{len(waits) - len(failed)}**, **{len(failed)}** |")
        print(f"| in all, s | {time.monotonic() - began_s:.0f} |")
        print(f"| loads on demand, unloads for room | {await _metric(http, 'tminus_model_loads_total'):.0f}, "
              f"{await _metric(http, 'tminus_model_unloads_total'):.0f} |")  # fmt: skip
        print(f"| a request's wait, s: median, largest | {statistics.median(waits):.2f}, {max(waits):.2f} |")
        print(f"| resident memory, MiB: at the start, largest, at the end | {memory[0] / 2**20:.0f}, "
              f"{max(memory) / 2**20:.0f}, {memory[-1] / 2**20:.0f} |")  # fmt: skip
        await _loads_alone(http, server)
        await _beside_ticks(http, ticks, loads)
    for failure in failed[:3]:
        print(failure)


async def _metric(http: httpx.AsyncClient, name: str) -> float:
    text = (await http.get("/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def _loads_alone(http: httpx.AsyncClient, server: servers.Running) -> None:
    """Load all one after the other while nothing else runs, twice, and unload all."""
    took_s, memory = list[float](), list[float]()
    for _ in range(2):
        for k in range(MODELS):
            states = {each["name"]: each["state"] for each in (await http.get("/models")).json()["models"]}
            began_s = time.monotonic()
            answer = await http.post(f"/models/m{k}/sample", json=ASK)
            assert answer.status_code == 200, answer.text
            if states[f"m{k}"] != "loaded":
                took_s.append(time.monotonic() - began_s)
            memory.append(resident_bytes(server.pid))
    print(f"| a request for a model that is out, on an idle server, s: median, range | "
          f"**{statistics.median(took_s):.2f}**, {min(took_s):.2f} to {max(took_s):.2f} |")  # fmt: skip
    cycles = ", ".join(f"{each / 2**20:.0f}" for each in memory[2::3])
    print(f"| resident memory with {FITTING} loaded, after each third load, MiB | {cycles} |")
    for k in range(MODELS):
        await http.post(f"/models/m{k}/unload")
    while await _metric(http, 'tminus_models{state="loaded"}'):  # noqa: ASYNC110  another process's
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    print(f"| with none loaded, MiB | {resident_bytes(server.pid) / 2**20:.0f} |")


async def _beside_ticks(http: httpx.AsyncClient, ticks: Path, loads: int) -> None:
    """Ask one model without pause, and load others now and then."""
    asking, windows = True, list[tuple[float, float]]()

    async def client() -> None:
        while asking:
            answer = await http.post("/models/m0/sample", json=LONG)
            assert answer.status_code == 200, answer.text

    await http.post("/models/m0/sample", json=ASK)
    task, began_s = asyncio.create_task(client()), time.time() + 1
    await asyncio.sleep(QUIET_S)
    for k in range(loads):
        name, started_s = f"m{1 + k % (MODELS - 1)}", time.time()
        answer = await http.post(f"/models/{name}/sample", json=ASK | {"steps": 1})
        assert answer.status_code == 200, answer.text
        windows.append((started_s, time.time()))
        await asyncio.sleep(QUIET_S / 2)
    asking = False
    await task
    await asyncio.sleep(1)
    found = [(float(end_s), float(took_s)) for end_s, took_s in ticks_in(ticks) if float(end_s) > began_s]
    gaps = [(end_s, took_s, end_s - before_s) for (before_s, _), (end_s, took_s) in itertools.pairwise(found)]
    during = [each for each in gaps if any(a <= each[0] <= b for a, b in windows)]
    apart = [each for each in gaps if not any(a <= each[0] <= b for a, b in windows)]
    print(f"| a load beside the ticks of another model, s | {statistics.median(b - a for a, b in windows):.2f} |")
    for text, at in (("a tick", 1), ("from the end of a tick to the end of the next", 2)):
        for title, q in (("median", 0.5), ("99th percentile", 0.99), ("largest", 1.0)):
            one, other = (quantile([each[at] for each in part], q) for part in (during, apart))
            print(f"| {text}, {title}, ms: during loads, otherwise | {1e3 * one:.1f}, {1e3 * other:.1f} |")
    print(f"\n{len(during)} ticks during {len(windows)} loads, {len(apart)} otherwise")


if __name__ == "__main__":
    main()
