"""What breaks under a server, one fault after the other: what comes of it, and is anything lost that was accepted?

    .venv/bin/python -m tests.trials.faults [--only disk,clock]

Each fault has an outcome that is stated here, and is brought about on a real process: a file system of 8 MiB that is
full, a clock that is set an hour on and an hour back (libfaketime, for the server's process alone), a limit on its
memory, and errors of the calls that would raise them (injected.py). Signals, and weights that are NaN or overflow, are
in tests/e2e. Accepted
means that POST /jobs answered 202. Not lost means that in the end, over restarts, each such job is done, in the bytes
of an undisturbed run, or has failed with a reason that the outcome names.
"""

import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import servers
from bench.servers import Server
from tests.e2e.conftest import RunningServer, start_server, stop_server
from tests.e2e.restarting import Deadly, ForkedServer, Restarting, make_specs
from tests.tools import find
from tests.trials.claims import Claim, report
from tests.trials.injected import Fault, inject
from tests.trials.replicas import jobs_of

FAKETIME = find("libfaketime")
FLAGS = ("--max-backlog-s", "100000")  # what is accepted here is what is asked
DISK = "8m"
HOUR_S = 3600
FULL = 507
PATIENCE_S = 120.0
FAULTS: "dict[str, tuple[str, Callable[[Bench], str], str]]" = {}  # what happens, how, and what comes of it


def fault(name: str, what: str, outcome: str) -> "Callable[[Callable[[Bench], str]], Callable[[Bench], str]]":
    """Name a fault that a function brings about; the function says what was seen."""

    def put(bring_about: "Callable[[Bench], str]") -> "Callable[[Bench], str]":
        FAULTS[name] = what, bring_about, outcome
        return bring_about

    return put


class Bench:
    """One fault's server, which can be started again, and what was accepted on it."""

    def __init__(self, checkpoint: Path, flags: Sequence[str], folder: Path, stack: ExitStack) -> None:
        self.checkpoint, self.folder, self.flags, self._stack = checkpoint, folder, (*FLAGS, *flags), stack
        self.trigger = folder / "trigger"
        self.accepted: dict[str, dict[str, Any]] = {}  # by id
        self._pool = stack.enter_context(ThreadPoolExecutor(8))

    def serve(self, *flags: str, fault: Fault | None = None, state: Path | None = None) -> Restarting:
        prepare = None if fault is None else partial(inject, fault, self.trigger)

        def start(*more: str, **env: str) -> RunningServer:
            server = start_server(self.checkpoint, *self.flags, *flags, *more, prepare=prepare, **env)
            self._stack.callback(end, server)
            return server

        return Restarting(start, state or self.folder / "state")

    def post(self, server: Restarting, count: int) -> None:
        """Durable jobs, of which one runs when this returns; the server is slow until `settle`, so that they last."""
        server.server.slow_down()
        offset = len(self.accepted)
        for spec in make_specs(offset + count)[offset:]:
            self.accepted[server.post(spec, f"key {spec['seed']}")] = spec
        server.server.wait_until(lambda: server.server.metric("tminus_rows_active") > 0)

    def ask(self, server: RunningServer, spec: dict[str, Any]) -> "Future[httpx.Response]":
        """POST /sample, in a thread."""
        return self._pool.submit(httpx.post, f"{server.url}/sample", json=spec, timeout=PATIENCE_S)

    def settle(self, server: Restarting, *reasons: str) -> str:
        """Wait for the end of all that was accepted; says how they ended. Failing is allowed for these reasons only."""
        server.server.speed_up()
        done, failed = 0, list[str]()
        for job_id, spec in self.accepted.items():
            job = server.wait_for(job_id)
            if job["state"] == "failed" and job["problem"]["code"] in reasons:
                failed.append(job["problem"]["code"])
                continue
            assert job["state"] == "done", f"job {job_id} is {job['state']}: {job.get('problem')}"
            image = server.get(f"/jobs/{job_id}/image")
            undisturbed = server.server.post(json=spec)
            assert image.status_code == undisturbed.status_code == 200, (
                f"{image.status_code}, {undisturbed.status_code}"
            )
            assert image.content == undisturbed.content, f"job {job_id} has other bytes than an undisturbed run"
            done += 1
        listed = server.get("/jobs", params={"limit": 200}).json()["jobs"]
        assert {job["id"] for job in listed} >= self.accepted.keys(), "a job is not listed"
        return f"{done} of {len(self.accepted)} jobs done, in the same bytes" + (
            f"; {len(failed)} failed: {', '.join(sorted(set(failed)))}" if failed else ""
        )


def end(server: RunningServer) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        stop_server(server)


def beside(server: Restarting) -> bool:
    """Whether a job is there that is not durable."""
    jobs = server.get("/jobs", params={"state": "waiting,running", "limit": 200}).json()["jobs"]
    return not all(job["durable"] for job in jobs)


# --- the disk ---


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK; needs root."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@fault("disk", f"the disk is full ({DISK})", "new jobs 507, sampling goes on; with room again all jobs are done")
def disk(bench: Bench) -> str:
    assert os.geteuid() == 0, "not tried: to mount a small file system needs root"
    with small_disk(bench.folder) as place:
        server = bench.serve(state=place / "state")
        bench.post(server, 4)
        filler = place / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        statuses = set[int]()
        server.server.wait_until(lambda: statuses.add(refused(server)) or FULL in statuses)  # type: ignore[func-returns-value]
        assert statuses <= {202, FULL}, f"POST /jobs was answered {sorted(statuses)}"
        assert server.server.post(json={"steps": 3}).status_code == 200, "POST /sample is not answered"
        server.server.wait_until(lambda: server.get("/readyz").status_code == FULL)
        server.server.speed_up()
        server.server.wait_until(
            lambda: server.server.metric("tminus_rows_active") == 0
        )  # they have ended, all but on disk
        states = {server.get(f"/jobs/{job_id}").json()["state"] for job_id in bench.accepted}
        assert "failed" not in states, "a job failed because the disk was full"
        filler.unlink()
        server.server.wait_until(lambda: server.get("/readyz").status_code == 200)
        seen = f"507 for new jobs and /readyz, 200 for POST /sample; with room again {bench.settle(server)}"
        stop_server(server.server)  # before its file system goes
    return seen


def refused(server: Restarting) -> int:
    """A further job; its status. One that is accepted counts no less than the others, but is not needed."""
    answer = httpx.post(f"{server.server.url}/jobs", json={"n": 4, "steps": 1}, timeout=PATIENCE_S)
    return answer.status_code


# --- the clock ---


class Clock:
    """The wall clock of one process: real time and an offset, which a file tells."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "faketime"
        self.set(0)

    def set(self, offset_s: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset_s:+d}")
        new.rename(self._file)

    @property
    def environment(self) -> dict[str, str]:
        # It reads the file once a second. Its fix for waits by the monotonic clock makes the server four times slower.
        options = {
            "CACHE_DURATION": "1",
            "FORCE_MONOTONIC_FIX": "0",
            "DONT_FAKE_MONOTONIC": "1",
            "TIMESTAMP_FILE": str(self._file),
        }
        return {"LD_PRELOAD": str(FAKETIME)} | {f"FAKETIME_{name}": value for name, value in options.items()}


@fault("clock", "the clock jumps an hour on, two back, and one on", "no job, deadline or ended job is touched")
def clock(bench: Bench) -> str:
    assert FAKETIME is not None, "not tried: it needs libfaketime (apt install libfaketime)"
    of_it = Clock(bench.folder)
    server = Server(bench.checkpoint, bench.folder / "state", bench.flags, of_it.environment)
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        server.start()
        bench._stack.callback(server.kill)
        created = list[str]()
        for offset_s in (HOUR_S, -HOUR_S, 0):
            # They still run when the clock is set, a second later, and an hour passes their deadlines.
            specs = [{"n": 1, "steps": 500, "seed": seed, "deadline_s": 3000} for seed in range(2)]
            ids = [http.post("/jobs", json=spec).raise_for_status().json()["id"] for spec in specs]
            bench.accepted |= dict(zip(ids, specs, strict=True))
            running = bench._pool.submit(http.post, "/sample", json={"n": 2, "steps": 100, "deadline_s": 3000})
            while not any(http.get(f"/jobs/{job_id}").json()["step"] for job_id in ids):
                time.sleep(0.02)
            of_it.set(offset_s)
            while abs(date_of(http) - time.time() - offset_s) > 60:
                time.sleep(0.05)
            created.append(http.post("/jobs", json={"steps": 1}).json()["created"])
            answer = running.result()
            assert answer.status_code == 200, f"POST /sample was answered {answer.status_code} {answer.text[:200]}"
            for job_id in ids:
                http.get(f"/jobs/{job_id}/events").raise_for_status()  # which end with the job
                job = http.get(f"/jobs/{job_id}").json()
                assert job["state"] == "done", (
                    f"with the clock at {offset_s:+d} s a job {job['state']}: {job.get('problem')}"
                )
                assert job["age_s"] >= 0, f"age {job['age_s']}"
            refused = http.post("/sample", json={"n": 64, "steps": 1000, "deadline_s": 0.5})
            assert refused.status_code in (422, 429), (
                f"a deadline that cannot be met was answered {refused.status_code}"
            )
        assert len({stamp[:13] for stamp in created}) >= 3, f"the clock was not set: {created}"  # to the hour
        before = {job["id"] for job in jobs_of(server)}
        assert server.terminate() == 0, "it did not end with 0"
        of_it.set(HOUR_S)
        server.start()
        after = {job["id"] for job in jobs_of(server)}
        assert after == before, f"{len(before - after)} of {len(before)} ended jobs are gone"
        metrics = http.get("/metrics").text
        late = re.search(r'tminus_jobs_aborted_total\{reason="deadline"\} (\S+)', metrics)
        assert late is None or float(late[1]) == 0, "a deadline passed"
    return f"{len(bench.accepted)} jobs done, all {len(before)} kept, no deadline passed"


def date_of(http: httpx.Client) -> float:
    """What the server takes for now, in Unix time."""
    return parsedate_to_datetime(http.get("/healthz").headers["date"]).timestamp()


# --- errors of calls ---


@fault("worker", "an error in the worker", "exit code 1; what runs is answered; after a restart all jobs are done")
def worker(bench: Bench) -> str:
    server = bench.serve(fault="worker")
    bench.post(server, 4)
    running = bench.ask(server.server, {"n": 2, "steps": 400})
    server.server.wait_until(lambda: running.done() or beside(server))
    bench.trigger.touch()
    code = server.server.process.wait(60)
    assert code == 1, f"exit code {code}"
    status = running.result().status_code
    assert status in (200, 500), f"what ran was answered {status}"
    server.start()
    return f"exit code 1, the running request answered {status}; after a restart {bench.settle(server)}"


@fault("death", "a job that ends the process by SIGSEGV", "after two deaths it fails as engine_failed; others are done")
def death(bench: Bench) -> str:
    return two_deaths(bench, "death")


@fault("hang", "a job that hangs, and a supervisor that kills what hangs", "the same")
def hang(bench: Bench) -> str:
    return two_deaths(bench, "hang")


def two_deaths(bench: Bench, kind: Fault) -> str:
    specs = make_specs(4)
    servers = [ForkedServer(bench.checkpoint, bench.folder / "state", bench.flags)]
    deadly = Deadly(servers, bench.trigger, kind)
    bench._stack.callback(deadly.stop)
    killer, others = deadly.post(specs)
    began_s = time.monotonic()
    states = deadly.states([killer, *others], PATIENCE_S)
    seen = (
        f"{deadly.deaths} deaths in {time.monotonic() - began_s:.0f} s; the job that is their cause is {states[0]}, "
        f"{states[1:].count('done')} of {len(others)} others are done"
    )
    assert (states, deadly.deaths) == (["failed"] + ["done"] * len(others), 2), seen
    problem = deadly.job(killer)["problem"]["code"]
    assert problem == "engine_failed", problem
    for job_id, spec in zip(others, specs, strict=True):
        image, undisturbed = deadly.image(job_id, spec)
        assert image == undisturbed, f"job {job_id} has other bytes than an undisturbed run"
    return f"{seen}, in the same bytes"


@fault("step", "an error in a step", "the jobs of that step fail as engine_failed; all others are done")
def step(bench: Bench) -> str:
    return failing_step(bench, "step")


@fault("memory-step", "the device has no memory for a step", "the same")
def memory_of_a_step(bench: Bench) -> str:
    return failing_step(bench, "memory of a step")


def failing_step(bench: Bench, kind: Fault) -> str:
    server = bench.serve(fault=kind)
    bench.post(server, 4)
    bench.trigger.touch()
    server.server.wait_until(lambda: not bench.trigger.exists())
    bench.post(server, 2)
    assert httpx.get(f"{server.server.url}/readyz").status_code == 200, "it is not ready"
    assert server.server.post(json={"steps": 3}).status_code == 200, "POST /sample is not answered"
    return f"the server goes on; {bench.settle(server, 'engine_failed')}"


@fault("memory-job", "the device has no memory for a job", "that job is answered 500; all others are done")
def memory_of_a_job(bench: Bench) -> str:
    server = bench.serve(fault="memory of a job")
    bench.post(server, 3)
    server.server.wait_until(lambda: server.server.log.count(" accepted: ") >= 3)  # the engine holds their rows
    bench.trigger.touch()
    answer = server.server.post(json={"n": 2, "steps": 3})
    assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed"), answer.text[:200]
    assert server.server.post(json={"n": 2, "steps": 3}).status_code == 200, "the next job is not answered"
    return f"that job is answered 500 engine_failed, the next one 200; {bench.settle(server)}"


def status_of(answer: "Future[httpx.Response]") -> str:
    """The status as a text; a connection that ended without an answer has none."""
    try:
        return str(answer.result().status_code)
    except (httpx.RemoteProtocolError, httpx.NetworkError):
        return "none, the connection ended"


@fault(
    "memory-limit",
    "the process gets no more memory",
    "it lives, what ends meanwhile is done or says why not, and with memory again it serves",
)
def memory_limit(bench: Bench) -> str:
    """A real limit on the address space of the process, for a while: the allocator itself refuses."""
    server = bench.serve("--max-n", "1024")
    bench.post(server, 3)
    server.server.speed_up()
    pid = server.server.process.pid
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.prlimit(pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    statuses = [bench.ask(server.server, {"n": n, "steps": 1, "seed": n}) for n in (1024, 1, 512, 1, 1024)]
    codes = sorted({status_of(each) for each in statuses})
    resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert server.server.process.poll() is None, "the process has ended"
    assert server.server.post(json={"n": 1024, "steps": 1}).status_code == 200, "with memory again it does not serve"
    seen = ", ".join(codes)
    return f"answers meanwhile: {seen}; with memory again 200; {bench.settle(server, 'engine_failed', 'internal')}"


def trial(checkpoint: Path, names: Sequence[str], flags: Sequence[str] = ()) -> list[Claim]:
    """Bring the faults about; what was seen."""
    claims = []
    for name in names:
        what, bring_about, outcome = FAULTS[name]
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            try:
                seen, holds = bring_about(Bench(checkpoint, flags, Path(folder), stack)), True
            except (AssertionError, httpx.HTTPError, subprocess.SubprocessError) as error:
                seen, holds = str(error).partition("\n")[0][:300], False
        print(f"{name}, {time.monotonic() - began_s:.0f} s: {seen}", file=sys.stderr, flush=True)
        claims.append(Claim(what, seen, outcome, holds))
    return claims


if __name__ == "__main__":
    asked = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, only=",".join(FAULTS))
    sys.exit(report(trial(asked.checkpoint, asked.only.split(","))))
