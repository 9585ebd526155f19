"""Single measurements: what a process of the bench prints, how another gathers them, and the tables made of them.

A program that measures a network runs parts of its work in processes of their own, each with a limit: what a part has
measured when its time is up counts, and what it has not is left out, in words.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from bench import result_file
from bench.result_file import ROOT, say
from bench.servers import describe, environment

Key = TypeVar("Key")

TURN_S = 0.3
PAUSE_S = 0.05  # between turns on a CPU: threads of one library spin for a while after their work
LEAST_TURNS = 2
QUEUE = 16  # calls that a GPU is given before it is waited for, or the queue would grow without bound


@dataclass(frozen=True, slots=True)
class Measure:
    """One number."""

    what: str
    contender: str
    value: float
    unit: str = ""
    precision: str = ""
    rows: int | None = None  # of a pass or a tick, where the number is of one
    network: str = ""


@dataclass(slots=True)
class Findings:
    """What a run has found, and what it has left out. Owned by the program that gathers."""

    begun: result_file.Begun = field(default_factory=result_file.Begun)
    measures: list[Measure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, sentence: str) -> None:
        """Note, and say, what is not measured and why."""
        say(sentence)
        self.left_out.append(sentence)

    def add(self, network: str, found: Iterable[Measure]) -> None:
        """Keep measurements of a network, also those before an error."""
        for each in found:
            self.measures.append(replace(each, network=network))

    def gather(self, network: str, part: str, module: str, options: Mapping[str, Any], limit_s: float) -> None:
        """Run a part, a module of ours, in a process of its own. After the limit it is ended."""
        say(f"{network}: {part}")
        began_s = time.monotonic()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in options.items())]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=out, stderr=log, start_new_session=True
            )
            try:
                status: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # torch.compile leaves workers
                end(process)
            for line in whole_lines(out):
                values = json.loads(line)
                if "left_out" in values:
                    self.leave_out(f"{network}: {part}: {values['left_out']}")
                else:
                    self.add(network, [Measure(**values)])
            if status is None:
                self.leave_out(f"{network}: {part}: what is not in the table had no time in {limit_s:.0f} s")
            elif status != 0:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                self.leave_out(f"{network}: {part} ended with {status}: {last:.300}")
        say(f"    {time.monotonic() - began_s:.0f} s")

    def write(self, name: str, folder: Path | None, *, quick: bool = False, **more: Any) -> None:
        """Write the results with what they were made on, and print them as tables."""
        found = more | {"measures": [asdict(each) for each in self.measures], "left_out": self.left_out}
        result_file.write(name, self.begun.made(describe(), quick=quick), found, folder)
        print(self.to_markdown())

    def to_markdown(self) -> str:
        """Make the tables: for each network one of what depends on the rows of a pass, and one of the rest."""
        parts = list[str]()
        for network in dict.fromkeys(each.network for each in self.measures):
            own = [each for each in self.measures if each.network == network]
            parts.append(f"### {network}")
            parts += [table(some) for some in ([e for e in own if e.rows is None], [e for e in own if e.rows]) if some]
        parts += [f"Left out: {sentence}." for sentence in self.left_out]
        return "\n\n".join(parts) + "\n"


def end(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """Kill a process that leads a session, and all of that session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def whole_lines(file: IO[str]) -> Iterable[str]:
    """Return the lines of a file, without a last one that was cut off."""
    file.seek(0)
    return [line for line in file if line.endswith("\n")]


def tell(*found: Measure | str) -> None:
    """Print measurements, and sentences on what is left out, as `gather` reads them."""
    for each in found:
        print(json.dumps({"left_out": each} if isinstance(each, str) else asdict(each)), flush=True)


def table(measures: Sequence[Measure]) -> str:
    """Make a table with a column for each number of rows, and a line for each other thing that differs."""
    rows = sorted({each.rows or 0 for each in measures})
    lines: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for each in measures:
        key = (each.what, each.contender, each.precision, each.unit)
        lines.setdefault(key, {})[each.rows or 0] = each.value
    heads = [f"{count} row{'s' * (count > 1)}" if count else "" for count in rows]
    made = ["| what | of | precision | unit | " + " | ".join(heads) + " |", "|---" * (4 + len(rows)) + "|"]
    for key, values in lines.items():
        cells = [f"{values[count]:.4g}" if count in values else "" for count in rows]
        made.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(made)


def rates_in_turns(calls: Mapping[Key, Callable[[], object]], device: torch.device, seconds: float) -> dict[Key, float]:
    """Measure how often a second each can be called; the best of their turns counts, as other programs may run."""
    best = dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()  # warms up
    until_s = time.perf_counter() + seconds
    turns = 0
    while turns < LEAST_TURNS or time.perf_counter() < until_s:
        for name, call in calls.items():
            best[name] = max(best[name], _rate(call, device))
            if device.type == "cpu":
                time.sleep(PAUSE_S)
        turns += 1
    return best


def _rate(call: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    count, began_s = 0, time.perf_counter()
    while count == 0 or time.perf_counter() < began_s + TURN_S:
        call()
        count += 1
        if count % QUEUE == 0:
            wait()
    wait()
    return count / (time.perf_counter() - began_s)
