"""Start and stop the contenders, and read what they have done. One at a time has the machine."""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import httpx

from bench.records import Ask, Counters
from bench.result_file import ROOT
from bench.tally import read_tally

READY_S = 600.0  # torch.compile may be tried, or the network be large
STOP_S = 5.0
HOST = "127.0.0.1"
PACKAGES = ("torch", "openvino", "diffusers", "litserve", "mosec")
READY_ASK = Ask(n=2, steps=2)
CHECKPOINT = ROOT / "checkpoints" / "fashion-mnist-32"
# tminus with one thing left out (controls.py); and setups that show why peers do more where all requests are alike.
CONTROLS = ("tminus_in_order", "tminus_one_job")
ONE_WORKER = ("litserve_openvino_one", "mosec_openvino_one")
SETUPS = ("tminus_two", *ONE_WORKER)
# Peers that get tminus' graph and precision, once it has chosen.
SAME_GRAPH = ("litserve_openvino", "litserve_steps_openvino", "litserve_queues_openvino", "mosec_openvino")


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that answers POST /sample."""

    key: str
    title: str
    command: tuple[str, ...]  # a module and its arguments, less those that every contender gets
    needs: str | None = None  # a package that has to be there
    is_peer: bool = True
    tree: Path = ROOT  # the checkout whose code it runs
    env: Mapping[str, str] = field(default_factory=dict)  # settings that have no flag
    processes: int = 1  # that answer in turns, each with a share of the cores


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that is ready."""

    contender: Contender
    urls: tuple[str, ...]  # of its processes
    pid: int
    tally: Path
    model: dict[str, Any]  # what tminus says of itself; empty for a peer

    @property
    def url(self) -> str:
        """Where it answers, or the first of its processes."""
        return self.urls[0]

    @property
    def places(self) -> int | None:
        """How many rows tminus takes in a tick; it may choose anew at each start."""
        found: int | None = self.model.get("limits", {}).get("max_batch")
        return found

    async def count(self, http: httpx.AsyncClient, seconds: float) -> tuple[Counters, float]:
        """Count what it does in about so many seconds; return that, and how many they were exactly."""
        before, before_s = await self.read_at(http)
        await asyncio.sleep(seconds)
        after, after_s = await self.read_at(http)
        return after.since(before), after_s - before_s

    async def read_at(self, http: httpx.AsyncClient) -> tuple[Counters, float]:
        """Read what it has done so far, and the middle of the time in which that was read."""
        asked_s = time.perf_counter()
        counters = await self.read(http)
        return counters, (asked_s + time.perf_counter()) / 2

    async def read(self, http: httpx.AsyncClient) -> Counters:
        """Read what it has done so far."""
        if self.contender.is_peer:
            row_steps, passes = read_tally(self.tally)
            return Counters(row_steps, row_steps, passes)
        answers = [await http.get(f"{url}/metrics", headers={"Accept": "*/*"}) for url in self.urls]
        sums = sum_metrics("\n".join(answer.text for answer in answers))
        return Counters(
            row_steps=sums.get("tminus_row_steps_total", 0.0),
            places=sums["tminus_tick_places_sum"],
            ticks=sums["tminus_tick_places_count"],
        )


def contenders(cores: int, tminus_flags: Sequence[str] = (), before: Path | None = None) -> dict[str, Contender]:
    """List all contenders; `before` is another checkout of tminus.

    A request-level batcher in eager PyTorch gets a worker a core of one thread each. That is LitServe's own advice for
    a CPU, and a long job then stops one worker, not all. With OpenVINO both `ways` are tried before the run.
    """
    # The loads are meant to be more than a server can do at once: its limits must not be what is measured.
    serve: tuple[str, ...] = ("tminus", "serve", "--log-level", "warning", "--grace-s", "0")
    serve += ("--max-backlog-s", "100000", "--result-cache-mb", "0", *tminus_flags)
    eager = (*serve, "--executor", "eager", "--precision", "float32")
    (_, workers), (_, one) = ways(cores)
    control, half = ("bench.controls",), str(max(1, cores // 2))
    litserve = ("bench.peers.litserve_server",)
    mosec = ("bench.peers.mosec_server", "--address", HOST, "--timeout", "3600000", "--log-level", "warning")
    every = [
        Contender("tminus", "tminus", serve, is_peer=False),
        Contender("tminus_eager", "tminus, eager float32", eager, is_peer=False),
        Contender("tminus_in_order", "tminus in order of arrival", (*control, "in-order", *serve[1:]), is_peer=False),
        Contender("tminus_one_job", "tminus, one job a tick", (*control, "one-job", *serve[1:]), is_peer=False),
        Contender("tminus_two", "two processes of tminus", (*serve, "--threads", half), is_peer=False, processes=2),
        Contender("lock", "diffusers behind a lock", ("bench.peers.lock_server",), "diffusers"),
        Contender("litserve", "LitServe", (*litserve, *workers), "litserve"),
        Contender("mosec", "mosec", (*mosec, *workers), "mosec"),
        Contender("litserve_openvino", "LitServe, OpenVINO", litserve, "litserve"),
        Contender("litserve_steps_openvino", "LitServe step by step", (*litserve, "--way", "steps"), "litserve"),
        Contender("litserve_queues_openvino", "LitServe, two queues", (*litserve, "--way", "queues"), "litserve"),
        Contender("mosec_openvino", "mosec, OpenVINO", mosec, "mosec"),
        Contender("litserve_openvino_one", "LitServe with one worker", (*litserve, *one), "litserve"),
        Contender("mosec_openvino_one", "mosec with one worker", (*mosec, *one), "mosec"),
    ]
    if before is not None:
        command = (entry(before) or "tminus", *serve[1:])
        every.insert(1, Contender("before", "tminus before", command, is_peer=False, tree=before))
    return {contender.key: contender for contender in every}


def ways(cores: int) -> Sequence[tuple[str, tuple[str, ...]]]:
    """List how a request-level batcher may share the cores among its workers, in words and as its arguments."""
    return (
        ("a worker for each core, of one thread", ("--workers", str(cores), "--threads", "1")),
        ("one worker, with the executor that tminus chose", ("--workers", "1", "--threads", str(cores))),
    )


def entry(checkout: Path) -> str | None:
    """Return the module of the command in a checkout: older ones have another name. None where there is none."""
    return next((name for name in ("tminus", "service") if (checkout / name / "__main__.py").is_file()), None)


def why_not(contender: Contender) -> str | None:
    """Say why a contender cannot run here; None where it can."""
    if contender.needs and importlib.util.find_spec(contender.needs) is None:
        return f"{contender.title} is left out: {contender.needs} is not installed."
    return None


@contextmanager
def running(contender: Contender, checkpoint: Path, threads: int | None, ready_s: float = READY_S) -> Iterator[Running]:
    """Start a contender and stop it, with all the processes that it started."""
    if contender.processes > 1:
        alone = replace(contender, processes=1)
        with ExitStack() as stack:
            every = [
                stack.enter_context(running(alone, checkpoint, threads, ready_s)) for _ in range(contender.processes)
            ]
            yield replace(every[0], contender=contender, urls=tuple(each.url for each in every))
        return
    port = free_port()
    command = list(contender.command)
    command += ["--checkpoint", str(checkpoint.resolve()), "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command += ["--tally", folder] if contender.is_peer else ["--host", HOST, "--state-dir", folder]
        if threads is not None and "--threads" not in command:
            command += ["--threads", str(threads)]
        # A session of its own: LitServe's workers outlive it otherwise, and spin.
        process = subprocess.Popen(
            _python(command),
            env=environment() | dict(contender.env),
            stdout=log,
            stderr=log,
            cwd=contender.tree,
            start_new_session=True,
        )
        try:
            url = f"http://{HOST}:{port}"
            _wait_until_ready(process, url, log, ready_s)
            model = {} if contender.is_peer else httpx.get(f"{url}/model", trust_env=False).json()
            yield Running(contender, (url,), process.pid, Path(folder), model)
            if process.poll() is not None:
                raise RuntimeError(f"{contender.title} ended by itself: {_tail(log)}")
        finally:
            _stop(process)


class Server:
    """A process that is killed and started again on one state folder and port."""

    def __init__(
        self,
        checkpoint: Path,
        state: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        tree: Path = ROOT,
    ) -> None:
        """log: a file for what it logs; else it goes where ours goes. tree: the checkout whose code it runs."""
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [sys.executable, "-m", entry(tree) or "tminus", "serve"]
        self.command += ["--checkpoint", str(checkpoint.resolve())]
        self.command += ["--port", str(self.port), "--state-dir", str(state), "--log-level", "warning", *flags]
        self._environment = environment() | dict(env or {})
        self._log, self._tree = log, tree
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.process = self._spawn()
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not become ready")
            time.sleep(0.02)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") if self._log is not None else nullcontext() as log:
            return subprocess.Popen(self.command, cwd=self._tree, env=self._environment, stderr=log)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more when this returns."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(READY_S)


def options_of(text: str | None, **defaults: Any) -> argparse.Namespace:
    """Read the command line of a program: an option for each default, of its type."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    return parser.parse_args()


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(peak_s: float = 0.5) -> dict[str, Any]:
    """Describe processor, system and versions; and the processor's peaks, measured for `peak_s` each (0: left out)."""
    return {
        **({"peaks_gflop_per_s": peaks(peak_s)} if peak_s else {}),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def peaks(seconds: float) -> dict[str, Any]:
    """Measure the GFLOP/s of the faster of a large matmul and a wide convolution, by precision."""
    return run_json("bench.bare", ["--peaks", "--seconds", str(seconds)], READY_S)


def run_json(module: str, arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a module of ours to its end; return the JSON object that it printed."""
    done = subprocess.run(
        _python([module, *arguments]), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=limit_s
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def sum_metrics(exposition: str) -> dict[str, float]:
    """Sum the samples of a Prometheus text over their labels, by name."""
    sums: defaultdict[str, float] = defaultdict(float)
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            sums[sample.partition("{")[0]] += float(value)
    return dict(sums)


def memory_bytes(pid: int) -> tuple[int, int] | None:
    """Return the peak and the resident memory of a process; None where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return 1024 * kib["VmHWM"], 1024 * kib["VmRSS"]


def environment() -> dict[str, str]:
    """Return the environment without settings, which would make the contenders differ, and without the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TMINUS_", "MOSEC_"))}
    return kept | {"HF_HUB_OFFLINE": "1"}


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: IO[str], ready_s: float) -> None:
    """Wait until a request is answered: that is the one sign that all contenders give alike.

    What a student refuses, since it has a sampler of its own, is asked again by its defaults.
    """
    end, body = time.monotonic() + ready_s, READY_ASK.to_body(seed=0)
    with httpx.Client(trust_env=False, timeout=max(1.0, ready_s), headers={"Accept": "image/png"}) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"a server did not start: {_tail(log)}")
            try:
                status = client.post(f"{url}/sample", json=body).status_code
            except httpx.TransportError:
                status = None
            if status == 200:
                return
            if status == 422:
                body = {"n": 1, "seed": 0}
            time.sleep(0.1)
    raise RuntimeError(f"a server was not ready after {ready_s:.0f} s: {_tail(log)}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-2000:]


def _python(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", *command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
