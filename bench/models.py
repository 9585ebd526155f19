"""Several models on one server: what sharing costs, and what a reload costs those who are being served.

    python -m bench.models [--rounds 5] [--reloads 6]

Sharing: the same jobs of two models, first one model's and then the other's, against both at once. Reloading: eight
clients ask without pause while a model's folder is replaced and read again; how long ticks take meanwhile, beside how
long they take otherwise, what fails, and the memory after each reload.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import servers
from bench.figures import quantile
from bench.streams import show
from tminus.service.access.keys import Key, digest_of, new_secret, to_line

CHECKPOINTS = servers.ROOT / "checkpoints"
JOBS, ROWS, STEPS = 6, 4, 100  # of each model
CLIENTS = 8
ASK = {"n": 2, "steps": 20, "sampler": "dpmpp_2m"}
SECRET = new_secret()
QUIET_S = 8.0  # before the first reload, and between two
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Measure and print; or, with --serve, be the server, and write down its ticks."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3:])
        return
    first, second = CHECKPOINTS / "fashion-mnist-32", CHECKPOINTS / "pixel-art-32"
    args = servers.options_of(__doc__, first=first, second=second, rounds=5, reloads=6)
    with tempfile.TemporaryDirectory() as folder:
        ticks = Path(folder) / "ticks"
        models = Path(folder) / "models"
        for name, source in (("first", args.first), ("second", args.second)):
            shutil.copytree(source, models / name)
        admin = to_line(Key("bench", "admin", digest_of(SECRET)))
        flags = ("--models", str(models), "--open")
        command = ("bench.models", "--serve", str(ticks), *servers.contenders(1)["tminus"].command[2:], *flags)
        # The default model is the first one in the folder; the one that the other benchmarks name is not needed.
        tminus = servers.Contender("tminus", "tminus", command, is_peer=False, env={"TMINUS_KEYS": admin})
        with servers.running(tminus, args.first, None) as server:
            asyncio.run(measure(server, models, ticks, args.rounds, args.reloads))


def serve(ticks: Path, arguments: Sequence[str]) -> None:
    """Run `tminus serve`, with a line in a file for each tick: when it ended, and how long it took."""
    from tminus.service.cli.main import main as tminus
    from tminus.service.scheduling.admission import Admission

    stepped, lines = Admission.stepped, list[str]()

    def noted(self: Admission, model: int, jobs: Any, places: int, seconds: float) -> None:
        lines.append(f"{time.time()} {seconds}\n")
        stepped(self, model, jobs, places, seconds)

    def write() -> None:
        with ticks.open("a") as file:
            while True:
                time.sleep(0.5)
                count = len(lines)
                file.writelines(lines[:count])
                file.flush()
                del lines[:count]

    Admission.stepped = noted  # type: ignore[method-assign]
    threading.Thread(target=write, daemon=True).start()
    # Of the checkpoint that the runner names, the same weights are in the folder of models.
    at = arguments.index("--checkpoint")
    tminus(["serve", *arguments[:at], *arguments[at + 2 :]])


@dataclass
class Clients:
    """What eight clients have met."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    fingerprints: set[str] = field(default_factory=set)
    until_s: float = float("inf")

    async def ask(self, http: httpx.AsyncClient) -> None:
        """One client, until the time is over."""
        while time.monotonic() < self.until_s:
            try:
                answer = await http.post("/models/first/sample", json=ASK)
            except httpx.TransportError as error:
                self.failed.append(repr(error))
                continue
            if answer.status_code == 200:
                self.answered += 1
                self.fingerprints.add(answer.headers["x-fingerprint"])
            else:
                self.failed.append(f"{answer.status_code} {answer.text[:200]}")


async def measure(server: servers.Running, models: Path, ticks: Path, rounds: int, reloads: int) -> None:
    """Sharing, then reloading."""
    headers = {"Authorization": f"Bearer {SECRET}", "Accept": "image/png"}
    async with httpx.AsyncClient(base_url=server.url, timeout=None, headers=headers) as http:
        ratios = []
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            first, second = await run(http, ["first"]), await run(http, ["second"])
            ratios.append((first + second) / await run(http, ["first", "second"]))
        print(f"{JOBS} jobs of {ROWS} images and {STEPS} steps of each model\n\n| what | | range |\n|---|---|---|")
        show("two models at once: row-steps/s / the same load on each, in turn", ratios)
        await reload(http, server.pid, models, ticks, reloads)


async def run(http: httpx.AsyncClient, names: Sequence[str]) -> float:
    """How long the jobs of these models take, all asked for at once, in seconds."""
    body = {"n": ROWS, "steps": STEPS, "sampler": "ddim"}
    began_s = time.perf_counter()
    answers = await asyncio.gather(
        *(http.post(f"/models/{name}/sample", json=body) for _ in range(JOBS) for name in names)
    )
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers][:1]
    return time.perf_counter() - began_s


async def reload(http: httpx.AsyncClient, pid: int, models: Path, ticks: Path, reloads: int) -> None:
    """Replace the first model again and again while eight clients ask for its images."""
    clients, windows = Clients(), list[tuple[float, float]]()
    memory = [resident_bytes(pid)]
    asking = [asyncio.create_task(clients.ask(http)) for _ in range(CLIENTS)]
    began_s = time.time() + 1
    await asyncio.sleep(QUIET_S)
    async with httpx.AsyncClient(base_url=http.base_url, timeout=None, headers=http.headers) as admin:
        for _ in range(reloads):
            replace_weights(models / "first")
            started_s = time.time()
            answer = await admin.post("/models/first/reload")
            assert answer.status_code == 200, answer.text
            windows.append((started_s, time.time() + 0.5))  # and until the old one has left
            await asyncio.sleep(QUIET_S)
            memory.append(resident_bytes(pid))
    clients.until_s = 0.0
    await asyncio.gather(*asking)
    await asyncio.sleep(1)
    lines = ticks_in(ticks)
    found = [(float(end_s), float(took_s)) for end_s, took_s in lines if float(end_s) > began_s]
    during = [took_s for end_s, took_s in found if any(a <= end_s - took_s and end_s <= b for a, b in windows)]
    apart = [took_s for end_s, took_s in found if not any(a <= end_s and end_s - took_s <= b for a, b in windows)]
    took = [end_s - 0.5 - start_s for start_s, end_s in windows]
    print(f"| requests answered, failed, of {len(clients.fingerprints)} versions of the weights | "
          f"**{clients.answered}**, **{len(clients.failed)}** | |")  # fmt: skip
    show("a reload, s", took)
    for name, q in (("median", 0.5), ("99th percentile", 0.99)):
        ratio = quantile(during, q) / quantile(apart, q)
        print(f"| ticks during reloads / otherwise, {name} | **{ratio:.2f}** "
              f"({1e3 * quantile(during, q):.1f} and {1e3 * quantile(apart, q):.1f} ms) | |")  # fmt: skip
    share = sum(during) / sum(b - a for a, b in windows), sum(apart) / (found[-1][0] - began_s - sum(took))
    print(f"| share of the time in ticks, during reloads and otherwise | {share[0]:.2f}, {share[1]:.2f} | |")
    print(
        f"| resident memory before, after each reload, MiB | {', '.join(f'{each / 2**20:.0f}' for each in memory)} | |"
    )
    for failure in clients.failed[:3]:
        print(failure)
    print(f"{len(apart)} ticks otherwise, {len(during)} during reloads")


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


def ticks_in(file: Path) -> list[list[str]]:
    """When each tick ended, and how long it took."""
    return [line.split() for line in file.read_text().splitlines()]


def resident_bytes(pid: int) -> float:
    """What the server's process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
