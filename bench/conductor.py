"""Run the contenders through the loads, in turns, and gather the records."""

import asyncio
import dataclasses
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bench import figures, servers
from bench.loads import Lengths, Turn
from bench.records import SLO, Bare, Pace, Run
from bench.result_file import say

ALIKE = ("idle", "saturation_1", "saturation_16")
LOADS = (*ALIKE, "mixed", "hang_ups", "slo", "bare", "lock_step")
# The loads of the others are all but `hang_ups` and `slo`.
LOADS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(servers.CONTROLS, ("saturation_1", "saturation_16", "mixed")),
    **dict.fromkeys(servers.SETUPS, ("saturation_1", "saturation_16")),
}
# Who hangs up is the same for a peer whatever executor it has, so one of each is put through it.
HUNG_UP = ("tminus", "before", "lock", "litserve", "mosec")
# At rates of tminus' executor only peers with the same graph have a chance; the lock shows what has none.
AT_RATES = ("tminus", "before", "lock", *servers.SAME_GRAPH)
TIMES = 3.0  # the time alone of the longest requests of the mix: so long a load `slo` is drained
HOPELESS = 0.2  # share in time: a contender that has less at a rate is not tried at higher ones
BARE_BATCHES = (1, 2, 4, 8, 16)
SCALED = {"saturation_1", "saturation_16", "hang_ups"}  # as many requests come as tminus is fast
GUESS = 400.0  # row-steps/s, until it is measured
SETTLE_S = 1.5  # a server that is still busy after that with abandoned work is started anew


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    checkpoint: Path
    contenders: Sequence[str]
    loads: Sequence[str] = LOADS
    lengths: Lengths = dataclasses.field(default_factory=Lengths)
    threads: int | None = None
    tminus_flags: Sequence[str] = ()
    before: Path | None = None


class Conductor:
    """Owns what has been found so far. A contender that fails is left out, and the run goes on."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._lengths = plan, plan.lengths
        self._run = Run(plan.checkpoint.name)
        known = servers.contenders(servers.cores(), plan.tminus_flags, plan.before)
        self._contenders: dict[str, servers.Contender] = {}
        for key in plan.contenders:
            if why := servers.why_not(known[key]):
                self._leave_out(why)
            else:
                self._contenders[key] = known[key]

    def run(self) -> Run:
        """Run all rounds."""
        if "tminus" in self._contenders:
            self._try("tminus", self._meet)
        for key in [key for key in self._contenders if key in (*servers.SAME_GRAPH, *servers.ONE_WORKER)]:
            self._try(self._contenders[key].title, lambda key=key: self._set_up(key))  # type: ignore[misc]
        if "slo" in self._plan.loads:
            self._try("the executor's own rate", self._find_own_rate)
        for number in range(1, self._lengths.rounds + 1):
            turns = [*self._contenders, "bare", "lock_step"]
            shift = (number - 1) * len(turns) // 2  # so that each stands once early and once late
            for key in turns[shift:] + turns[:shift]:
                self._take_turn(key, number)
        return self._run

    def _meet(self) -> None:
        """Start tminus once: it finds its executor, if it has not yet, and says what it is."""
        with self._started(self._contenders["tminus"]) as server:
            self._run.model = server.model
            if SCALED & set(self._plan.loads):
                self._run.capacity["tminus"] = asyncio.run(self._turn(server, 0).rate(self._lengths.trial_s))
            if "slo" in self._plan.loads:
                self._run.alone_s = asyncio.run(self._turn(server, 0).alone())

    def _set_up(self, key: str) -> None:
        """Give a peer the executor and precision that tminus chose, and of the ways to share the cores the faster."""
        contender = self._contenders.pop(key)
        executor, precision = (self._run.model.get(name) for name in ("executor", "precision"))
        if executor != "openvino" or precision is None:
            self._leave_out(f"{contender.title} is left out: tminus chose {executor}.")
            return
        if key in servers.ONE_WORKER:
            self._contenders[key] = replace(contender, command=(*contender.command, "--openvino", precision))
            return
        best: tuple[float, servers.Contender] | None = None
        for way, arguments in servers.ways(servers.cores()):
            tried = replace(contender, command=(*contender.command, "--openvino", precision, *arguments))
            say(f"{contender.title}: {way}")
            with self._started(tried) as server:
                rate = asyncio.run(self._turn(server, 0).rate(self._lengths.trial_s))
            self._run.trials.setdefault(key, {})[way] = rate
            if best is None or rate > best[0]:
                best, self._run.setups[key] = (rate, tried), way
        assert best is not None
        self._contenders[key] = best[1]

    def _take_turn(self, key: str, number: int) -> None:
        loops = {
            "bare": lambda: self._run.bare.append(self._bare(number)),
            "lock_step": lambda: self._run.lock_step.append(self._lock_step()),
        }
        if key in loops:
            if key in self._plan.loads:
                say(f"round {number}/{self._lengths.rounds}: {key}")
                self._try(key, loops[key])
            return
        contender = self._contenders[key]
        wanted = LOADS_OF.get(key, (*ALIKE, "mixed")) + (("hang_ups",) if key in HUNG_UP else ())
        todo = [load for load in wanted if load in self._plan.loads]
        todo += SLO if self._run.own_rate and key in AT_RATES else ()
        self._try(contender.title, lambda: self._run_loads(contender, number, todo))

    def _run_loads(self, contender: servers.Contender, number: int, todo: list[str]) -> None:
        todo = list(todo)
        while todo:
            with self._started(contender) as server:
                busy = False
                while todo and not busy:
                    load = todo.pop(0)
                    say(f"round {number}/{self._lengths.rounds}: {contender.title}: {load}")
                    started_s = time.monotonic()
                    turn = self._turn(server, number)
                    if not self._run_load(turn, load):
                        todo.clear()
                    busy = bool(todo) and not asyncio.run(turn.settled(SETTLE_S))
                    say(f"    {time.monotonic() - started_s:.0f} s")

    def _run_load(self, turn: Turn, load: str) -> bool:
        """Returns whether those after it are worth their time."""
        calls = {"idle": turn.idle, "mixed": turn.mixed, "hang_ups": turn.hang_ups}
        alone_s = self._run.alone_s
        if load in SLO:
            loaded = asyncio.run(turn.slo(load, self._run.own_rate, TIMES * max(alone_s.values())))
        else:
            loaded = asyncio.run(turn.saturation(load) if load not in calls else calls[load]())
        self._run.loads.append(loaded)
        # Past 1024 jobs at a time tminus refuses; past MOST_OUTSTANDING the client sends no more.
        if refused := sum(each.outcome in ("refused", "unsent") for each in loaded.answers):
            title, sent = turn.server.contender.title, len(loaded.answers)
            self._leave_out(
                f"{title} took {sent - refused} of {sent} requests of {load}: its waits are of these alone."
            )
        if load == "saturation_1":
            self._run.capacity[turn.server.contender.key] = max(1.0, figures.row_steps_per_s(loaded))
        return load not in SLO or figures.in_time(loaded, figures.WITHIN["within_5"], alone_s) >= HOPELESS

    def _find_own_rate(self) -> None:
        """Find the rate of which the loads `slo` are shares. The executor and the times alone are those of tminus."""
        if not self._run.alone_s:
            raise LookupError("the load slo needs tminus")
        say("the executor's own rate")
        self._run.own_rate = max(pace.rows_per_s for pace in self._bare(0).paces.values())

    def _bare(self, number: int) -> Bare:
        executor, precision = self._run.model.get("executor", "eager"), self._run.model.get("precision", "float32")
        batches = sorted({*BARE_BATCHES, self._run.places})
        seconds = self._lengths.bare_s
        arguments = ["--checkpoint", str(self._plan.checkpoint.resolve()), "--seconds", str(seconds)]
        arguments += ["--executor", executor, "--precision", precision, "--batches", *map(str, batches)]
        if self._plan.threads is not None:
            arguments += ["--threads", str(self._plan.threads)]
        found = servers.run_json("bench.bare", arguments, servers.READY_S + 4 * seconds * (len(batches) + 3))
        if (details := self._run.model.get("executor_details")) not in (None, found["details"]):
            self._leave_out(f"The bare loop's executor was {found['details']}, the server's {details}.")
        paces = {int(batch): Pace(**pace) for batch, pace in found["bare"].items()}
        return Bare(number, executor, precision, found["flops_per_row"], paces)

    def _lock_step(self) -> dict[str, dict[str, float]]:
        if self._run.model.get("executor") != "openvino":
            raise LookupError("it is of OpenVINO's passes")
        arguments = ["--checkpoint", str(self._plan.checkpoint.resolve()), "--seconds", str(self._lengths.lock_step_s)]
        arguments += ["--precision", self._run.model["precision"]]
        return servers.run_json("bench.lock_step", arguments, servers.READY_S)

    def _started(self, contender: servers.Contender) -> Any:
        return servers.running(contender, self._plan.checkpoint, self._plan.threads)

    def _turn(self, server: servers.Running, number: int) -> Turn:
        most = max(self._run.capacity.values(), default=GUESS)
        return Turn(server, number, self._lengths, self._run.capacity.get(server.contender.key, most))

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Leave out a contender that fails: the results of the others are kept."""
        try:
            call()
        except (
            RuntimeError,
            ArithmeticError,
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
