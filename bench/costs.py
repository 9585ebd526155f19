"""What features cost: the same load without and with each, in turns on one server. Writes bench/results/costs.json.

    python -m bench.costs [--only durable,viewers,models] [--rounds 3] [--quick 1]

Ten minutes on two cores.
"""

import asyncio
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench import result_file, servers
from bench.client import meanwhile
from bench.records import Ask
from tminus.service.access.keys import Key, digest_of, new_secret, to_line

JOB = Ask(n=1, steps=1000)
LONG = Ask(n=8, steps=1000)
DURABLE_JOBS = 20
VIEWERS, DEAF, FPS = 50, 10, 5.0  # viewers, how many of them read nothing, and frames a second for each
MODEL_JOBS, MODEL_ASK = 6, {"n": 4, "sampler": "ddim"}
CLIENTS, CLIENT_ASK = 8, {"n": 2, "steps": 20, "sampler": "dpmpp_2m"}
ONE, OTHER = servers.CHECKPOINT.name, "pixel-art-32"
WARM_UP_S, DRAIN_S = 2.0, 120.0
CHECKPOINTS = result_file.ROOT / "checkpoints"
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
SECRET = new_secret()

Found = dict[str, Any]


def main() -> None:
    """Measure, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = servers.options_of(__doc__, only=",".join(PARTS), rounds=3, quick=0, out="")
    begun = result_file.begin(wait=not args.quick)
    machine = servers.describe(0.2 if args.quick else 1.0)
    rounds, window_s = (1, 1.5) if args.quick else (args.rounds, 8.0)
    found: dict[str, Found] = {}
    chosen = args.only.split(",")
    flags = ("--max-streams-per-address", "4096")
    if on_one := [name for name in chosen if name != "models"]:
        with servers.running(servers.contenders(1, flags)["tminus"], servers.CHECKPOINT, None) as server:
            for name in on_one:
                result_file.say(f"{name} …")
                found[name] = asyncio.run(PARTS[name](server, rounds, window_s))
    if "models" in chosen:
        result_file.say("models …")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(CHECKPOINTS / OTHER, Path(folder) / OTHER)
            with servers.running(_of_models(Path(folder)), servers.CHECKPOINT, None) as server:
                found["models"] = asyncio.run(models(server, Path(folder), rounds, window_s))
    result_file.write("costs", begun.made(machine, quick=bool(args.quick)), found, args.out)


# --- durable jobs ---


async def durable(server: servers.Running, rounds: int, window_s: float) -> Found:
    """Jobs of 1000 steps by POST /sample and by POST /jobs, which are snapshotted, in turns."""
    plain, kept = list[float](), list[float]()
    async with _client(server) as http:
        for _ in range(rounds):
            async with meanwhile(*(ask_again(http, k, LONG) for k in range(DURABLE_JOBS))):
                plain.append(await rate(server, http, window_s))
            await _until_none_runs(http)
            async with durable_jobs(http):
                kept.append(await rate(server, http, window_s))
    return {"ratio": result_file.ratio(kept, plain)}


@asynccontextmanager
async def durable_jobs(http: httpx.AsyncClient) -> AsyncIterator[None]:
    """Have some durable jobs of many steps run meanwhile."""
    answers = await asyncio.gather(*(http.post("/jobs", json=LONG.to_body(k)) for k in range(DURABLE_JOBS)))
    ids = [answer.raise_for_status().json()["id"] for answer in answers]
    try:
        yield
    finally:
        for job_id in 2 * ids:  # cancelled, and forgotten
            await http.delete(f"/jobs/{job_id}")
        await _until_none_runs(http)


# --- viewers ---


async def viewers(server: servers.Running, rounds: int, window_s: float) -> Found:
    """Jobs without and with a WebSocket each that shows x_t and x_0."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    late, first_s = list[float](), await _first_frames(server, 20)
    for _ in range(rounds):
        for is_watched in (False, True):
            gaps: list[float] = []
            async with _client(server) as http:
                jobs = VIEWERS if not is_watched else 0
                asking = [ask_again(http, k) for k in range(jobs)]
                asking += [_watch(server, gaps) for _ in range(VIEWERS - DEAF if is_watched else 0)]
                asking += [_connect_and_sleep(server) for _ in range(DEAF if is_watched else 0)]
                async with meanwhile(*asking):
                    rates[is_watched].append(await rate(server, http, window_s, gaps.clear))
                await _until_none_runs(http)
            if gaps:
                late.append(1000 * (max(gaps) - 1 / FPS))
    return {
        "ratio": result_file.ratio(rates[True], rates[False]),
        "late_ms": result_file.rounds(late),
        "first_frame_ms": 1000 * median(first_s),
    }


async def _first_frames(server: servers.Running, count: int) -> list[float]:
    took = []
    async with _stream(server) as ws:
        for seed in range(count):
            began_s = time.perf_counter()
            frames = _frames(ws, Ask(n=1, steps=20).to_body(seed) | {"every": 1, "keep_open": True})
            first_s, *_ = [at_s async for at_s in frames]
            took.append(first_s - began_s)
    return took


async def _frames(ws: ClientConnection, body: dict[str, Any]) -> AsyncIterator[float]:
    """Run a job; gives the time at which each of its frames came."""
    await ws.send(json.dumps(body))
    async for message in ws:
        if isinstance(message, bytes):
            yield time.perf_counter()
        elif json.loads(message)["type"] == "done":
            await ws.recv()
            return


async def _watch(server: servers.Running, gaps: list[float]) -> None:
    """A viewer of one job after the other."""
    async with _stream(server) as ws:
        for seed in itertools.count():
            last_s = None
            async for now_s in _frames(ws, _watched(seed)):
                if last_s is not None:
                    gaps.append(now_s - last_s)
                last_s = now_s


async def _connect_and_sleep(server: servers.Running) -> None:
    """A viewer that reads nothing after its job was accepted."""
    async with _stream(server, max_queue=1) as ws:
        await ws.send(json.dumps(_watched(0)))
        await asyncio.sleep(1_000_000)


def _watched(seed: int) -> dict[str, Any]:
    return JOB.to_body(seed) | {"fps": FPS, "show": ["x_t", "x_0"], "keep_open": True}


@asynccontextmanager
async def _stream(server: servers.Running, **options: Any) -> AsyncIterator[ClientConnection]:
    """A WebSocket; one that is cut off in mid-job is left without a word."""
    url = f"{server.url.replace('http', 'ws')}/sample/stream"
    ws = await connect(url, ping_interval=None, proxy=None, compression=None, **options)
    try:
        yield ws
    finally:
        with suppress(Exception):
            ws.transport.abort()


# --- several models ---


def _of_models(folder: Path) -> servers.Contender:
    """A server of the bundled checkpoint and of the models of a folder."""
    known = servers.contenders(1, ("--models", str(folder), "--idle-unload", "1h", "--open"))["tminus"]
    admin = to_line(Key("bench", "admin", digest_of(SECRET)))
    return servers.Contender(
        "tminus", "tminus", known.command, is_peer=False, env=dict(known.env) | {"TMINUS_KEYS": admin}
    )


async def models(server: servers.Running, folder: Path, rounds: int, window_s: float) -> Found:
    """Two models at once against one after the other; then clients who ask while one is reloaded; then a load."""
    sharing, reload_s, load_s = list[float](), list[float](), list[float]()
    waits: dict[bool, list[float]] = {False: [], True: []}  # otherwise, and during reloads
    failed: list[int] = []
    steps = 100 if window_s > 2 else 6
    headers = {"Authorization": f"Bearer {SECRET}", "Accept": "image/png"}
    async with httpx.AsyncClient(base_url=server.url, timeout=None, headers=headers, trust_env=False) as http:
        (await http.post(f"/models/{OTHER}/sample", json=CLIENT_ASK)).raise_for_status()  # loads it
        for _ in range(rounds):
            apart_s = await _took(http, [ONE], steps) + await _took(http, [OTHER], steps)
            sharing.append(apart_s / await _took(http, [ONE, OTHER], steps))
        is_reloading = False

        async def client() -> None:
            while True:
                began_s, before = time.monotonic(), is_reloading
                answer = await http.post(f"/models/{OTHER}/sample", json=CLIENT_ASK)
                if answer.status_code != 200:
                    failed.append(answer.status_code)
                waits[before or is_reloading].append(time.monotonic() - began_s)

        async with meanwhile(*(client() for _ in range(CLIENTS))):
            for _ in range(rounds):
                await asyncio.sleep(window_s / 2)
                replace_weights(folder / OTHER)
                is_reloading, began_s = True, time.monotonic()
                (await http.post(f"/models/{OTHER}/reload")).raise_for_status()
                reload_s.append(time.monotonic() - began_s)
                is_reloading = False
        for _ in range(rounds):
            while await _state(http) != "unloaded":
                # A client that has just hung up may have had it loaded once more.
                await http.post(f"/models/{OTHER}/unload")
                await asyncio.sleep(0.1)
            began_s = time.monotonic()
            (await http.post(f"/models/{OTHER}/sample", json=CLIENT_ASK)).raise_for_status()
            load_s.append(time.monotonic() - began_s)
    return {
        "sharing_ratio": result_file.rounds(sharing),
        "answered": len(waits[False]) + len(waits[True]) - len(failed),
        "failed": len(failed),
        "reload_s": result_file.rounds(reload_s),
        "reload_wait_ratio": median(waits[True]) / median(waits[False]) if all(waits.values()) else None,
        "load_s": result_file.rounds(load_s),
    }


async def _state(http: httpx.AsyncClient) -> str:
    models = (await http.get("/models", headers={"Accept": "application/json"})).json()["models"]
    return str(next(each["state"] for each in models if each["name"] == OTHER))


async def _took(http: httpx.AsyncClient, names: Sequence[str], steps: int) -> float:
    """How long the jobs of these models take, all asked for at once, in seconds."""
    began_s, body = time.perf_counter(), MODEL_ASK | {"steps": steps}
    answers = await asyncio.gather(
        *(http.post(f"/models/{name}/sample", json=body) for _ in range(MODEL_JOBS) for name in names)
    )
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers][:1]
    return time.perf_counter() - began_s


def replace_weights(folder: Path) -> None:
    """Write other weights beside the model's, a little different, and rename them into place."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(folder / WEIGHTS, "pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(name for name in state if name.endswith("conv_out.bias"))
    state[name] = state[name] + 1e-4
    save_file(state, folder / "new.safetensors", metadata)
    (folder / "new.safetensors").replace(folder / WEIGHTS)
    settings = json.loads((folder / "tminus.json").read_text())
    settings.pop("checked", None)  # what was approved for the earlier weights
    (folder / "tminus.json").write_text(json.dumps(settings))


# --- what they share ---


async def ask_again(http: httpx.AsyncClient, number: int, job: Ask = JOB) -> None:
    """A client that only waits, for one job after the other."""
    for seed in itertools.count():
        (await http.post("/sample", json=job.to_body(1000 * number + seed))).raise_for_status()


def _client(server: servers.Running) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, trust_env=False)


async def rate(
    server: servers.Running, http: httpx.AsyncClient, window_s: float, at_start: Callable[[], None] = lambda: None
) -> float:
    """Row-steps per second in a window after a warm-up."""
    await asyncio.sleep(WARM_UP_S)
    at_start()
    counted, took_s = await server.count(http, window_s)
    return counted.row_steps / took_s


async def _until_none_runs(http: httpx.AsyncClient) -> None:
    while (await http.get("/jobs?state=waiting,running")).json()["jobs"]:  # noqa: ASYNC110  another process's
        await asyncio.sleep(0.1)


PARTS: dict[str, Callable[..., Coroutine[Any, Any, Found]]] = {
    "durable": durable,
    "viewers": viewers,
    "models": models,
}

if __name__ == "__main__":
    main()
