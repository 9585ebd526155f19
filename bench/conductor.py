"""Who takes a turn at what, and when: runs the contenders through the loads and gathers the records."""

import argparse
import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx

from bench import figures, servers
from bench.loads import QUICK, SATURATION_OF_16, SATURATION_OF_DPMPP, Lengths, Turn
from bench.records import Answer, Bare, Identity, Loaded, Pace, Run

EVERY_ROUND = ("idle", "saturation", "saturation-16")
EVERY_ROUND_OF_OURS = ("saturation-dpmpp_2m",)  # of tminus as it is and as it was: the peers have ddpm alone
ONCE = ("mixed", "burst", "steps", "hang-ups")
OF_TMINUS = ("policy", "first-step", "eta", "crowd")
ON_ITS_OWN = ("identity", "memory")  # of tminus too, each on a fresh server
LOADS = (*EVERY_ROUND, *EVERY_ROUND_OF_OURS, "bare", *ONCE, *OF_TMINUS, *ON_ITS_OWN)
# By the row-steps/s of tminus, saturated.
SCALED = {"saturation", "saturation-16", *EVERY_ROUND_OF_OURS, "steps", "policy", "hang-ups"}
BARE_BATCHES = (1, 4, 8, 16)
GUESS = 400.0  # row-steps/s, until it is measured
SETTLE_S = 1.5  # a server that is still busy after that with abandoned work is started anew


class Conductor:
    """Owns what has been found so far. A contender that fails is left out, and the run goes on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        lengths = QUICK if args.quick else Lengths()
        self._lengths = dataclasses.replace(lengths, rounds=args.rounds) if args.rounds else lengths
        command = " ".join(["python -m bench", *sys.argv[1:]])
        machine, load_average = servers.describe(), os.getloadavg()[0]
        self._run = Run(command, args.checkpoint.name, args.quick, commit(), machine, load_average)
        self._contenders: dict[str, servers.Contender] = {}
        for key, contender in servers.contenders(servers.cores(), args.tminus_flags, args.before).items():
            if key in args.contenders:
                if why := servers.why_not(contender):
                    self._leave_out(why)
                else:
                    self._contenders[key] = contender
        texts = tunings(servers.cores())
        self._run.tunings = {key: text for key, text in texts.items() if key in self._contenders}

    def run(self) -> Run:
        """Run all rounds."""
        started_s = time.monotonic()
        if "tminus" in self._contenders:
            self._try("tminus", self._meet)
        for number in range(1, self._lengths.rounds + 1):
            turns = [*self._contenders, "bare"]
            if "tminus" in turns:  # its executor is the bare loop's, its speed scales the loads
                turns.insert(1, turns.pop())
            shift = (number - 1) % len(turns)
            for key in turns[shift:] + turns[:shift]:
                self._take_turn(key, number)
        for load, call in (("identity", self._run_identity), ("memory", self._run_memory)):
            if load in self._args.only and "tminus" in self._contenders:
                self._try(load, call)
        self._run.date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        self._run.seconds = time.monotonic() - started_s
        return self._run

    def _meet(self) -> None:
        """Start tminus once: it finds its executor, if it has not yet, and says what it is."""
        with self._tminus() as server:
            self._learn(server)

    def _learn(self, server: servers.Running) -> None:
        if server.contender.is_peer or server.contender.key == "before":
            return
        if not self._run.model:
            self._run.model = server.model
        elif server.places != self._run.places:
            self._leave_out(f"tminus chose {self._run.places} places a tick at one start, {server.places} at another.")

    def _take_turn(self, key: str, number: int) -> None:
        if key == "bare":
            if "bare" in self._args.only:
                self._try("bare", lambda: self._run_bare(number))
            return
        contender, first = self._contenders[key], number == 1
        wanted: list[str] = []
        if key != "fcfs":
            wanted += [*EVERY_ROUND, *(EVERY_ROUND_OF_OURS if not contender.is_peer else ()), *(ONCE if first else ())]
        if first and key in ("tminus", "fcfs"):
            wanted += OF_TMINUS if key == "tminus" else ("policy",)
        todo = [load for load in wanted if load in self._args.only]
        if key == "tminus" and self._run.capacity is None and SCALED & set(self._args.only):
            todo = ["saturation", *(load for load in todo if load != "saturation")]
        self._try(contender.title, lambda: self._run_loads(contender, number, todo))

    def _run_loads(self, contender: servers.Contender, number: int, todo: list[str]) -> None:
        todo = list(todo)
        while todo:
            with servers.running(contender, self._args.checkpoint, self._args.threads) as server:
                self._learn(server)
                busy = False
                while todo and not busy:
                    load = todo.pop(0)
                    say(f"round {number}/{self._lengths.rounds}: {contender.title}: {load}")
                    started_s = time.monotonic()
                    turn = self._turn(server, number)
                    self._run_load(turn, load)
                    busy = bool(todo) and not asyncio.run(turn.settled(SETTLE_S))
                    say(f"    {time.monotonic() - started_s:.0f} s")

    def _run_load(self, turn: Turn, load: str) -> None:
        if load == "eta":
            self._run.etas = asyncio.run(turn.etas())
            if not self._run.etas.samples:
                self._leave_out("The ETA is left out: GET /jobs told of no running job.")
            return
        if load == "crowd":
            self._run.crowds = asyncio.run(turn.crowds())
            return
        calls: dict[str, Callable[[], Coroutine[Any, Any, Loaded]]] = {
            "idle": turn.idle,
            "saturation": turn.saturation,
            "saturation-16": lambda: turn.saturation("saturation-16", SATURATION_OF_16),
            "saturation-dpmpp_2m": lambda: turn.saturation("saturation-dpmpp_2m", SATURATION_OF_DPMPP),
            "mixed": turn.mixed,
            "burst": turn.burst,
            "steps": turn.steps,
            "policy": turn.policy,
            "hang-ups": turn.hang_ups,
            "first-step": turn.first_step,
        }
        loaded = asyncio.run(calls[load]())
        if load in self._args.only:
            self._run.loads.append(loaded)
        if load == "saturation" and turn.server.contender.key == "tminus" and self._run.capacity is None:
            self._run.capacity = figures.row_steps_per_s(loaded)

    def _run_bare(self, number: int) -> None:
        say(f"round {number}/{self._lengths.rounds}: bare executor loop")
        executor, precision = self._run.model.get("executor", "eager"), self._run.model.get("precision", "float32")
        batches = sorted({*BARE_BATCHES, self._run.places})
        seconds = self._lengths.bare_s
        arguments = ["--checkpoint", str(self._args.checkpoint.resolve()), "--seconds", str(seconds)]
        arguments += ["--executor", executor, "--precision", precision, "--batches", *map(str, batches)]
        if self._args.threads is not None:
            arguments += ["--threads", str(self._args.threads)]
        found = servers.run_json("bench.bare", arguments, servers.READY_S + 4 * seconds * (len(batches) + 3))
        self._run.machine |= {name: found[name] for name in ("capability", "threads")}
        if (details := self._run.model.get("executor_details")) not in (None, found["details"]):
            self._leave_out(f"The bare loop's executor was {found['details']}, the server's {details}.")
        paces = {int(batch): Pace(**pace) for batch, pace in found["bare"].items()}
        flops = (found["matmul_flops"], found["matmul_bfloat16_flops"], found["conv_flops"])
        self._run.bare.append(Bare(number, executor, precision, found["flops_per_row"], *flops, paces))

    def _run_identity(self) -> None:
        """Under load, then after a restart one at a time."""
        samplers = tuple(self._run.model["samplers"])
        classes = len(self._run.model["class_names"]) if self._run.model["null_class"] is not None else 0
        found: list[Loaded] = []
        for loaded in (True, False):
            say(f"byte-identical images: {'under load' if loaded else 'alone'}")
            with self._tminus() as server:
                self._learn(server)
                turn = self._turn(server, 1)
                found.append(asyncio.run(turn.identity_asked(self._run.model, classes, loaded=loaded)))
        under_load, alone = found
        pairs = same_places(under_load.answers, alone.answers)
        same = sum(one == other for one, other in pairs)
        self._run.identity = Identity(len(pairs), same, samplers, figures.rows_per_tick(under_load))
        self._run.loads.append(under_load)

    def _run_memory(self) -> None:
        say(f"memory after {self._lengths.requests} requests")
        with self._tminus() as server:
            self._run.memory = asyncio.run(self._turn(server, 1).memory())

    def _tminus(self) -> Any:
        return servers.running(self._contenders["tminus"], self._args.checkpoint, self._args.threads)

    def _turn(self, server: servers.Running, number: int) -> Turn:
        return Turn(server, number, self._lengths, self._run.capacity or GUESS)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Half an hour of results is not thrown away for one contender."""
        try:
            call()
        except (
            RuntimeError,
            OSError,
            ExceptionGroup,
            httpx.HTTPError,
            subprocess.SubprocessError,
            LookupError,
        ) as error:
            say(str(error))
            last_line = (str(error).strip() or "no message").splitlines()[-1]
            self._leave_out(f"{what} failed: {type(error).__name__}: {last_line}")

    def _leave_out(self, sentence: str) -> None:
        say(sentence)
        if sentence not in self._run.left_out:
            self._run.left_out.append(sentence)


def same_places(some: Sequence[Answer], others: Sequence[Answer]) -> list[tuple[str, str]]:
    """Digests of what was answered both times, by job: the pairs that should be equal."""
    digests = {a.seed: a.digest for a in some if a.digest is not None}
    return [(digests[a.seed], a.digest) for a in others if a.digest is not None and a.seed in digests]


def tunings(cores: int) -> dict[str, str]:
    """How each contender was set up, in words."""
    batched = (
        f"{cores} workers of one thread each, batches of up to 16 requests, 5 ms to fill one; each batch is grouped by "
        "steps and sampler and runs in passes of up to 16 rows; the faster of the two memory layouts; float32 eager"
    )
    return {
        "tminus": "as it starts by default, with its limits lifted and its result cache off.",
        "before": "another checkout, started the same way.",
        "lock": "FastAPI, one thread loads and runs the pipeline, the faster of the two memory layouts; float32 eager.",
        "litserve": f"{batched}.",
        "mosec": f"{batched}.",
    }


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=servers.ROOT,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Tell progress, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)
