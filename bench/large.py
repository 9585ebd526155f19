"""Networks of a hundred million parameters on this machine: start, memory, and a pass, beside diffusers.

    python -m bench.large [--networks cifar,celebahq] [--before ../old] [--rows 1,4] [--out bench/results]

A network is one of bench/networks.py, with random weights, or the folder of a checkpoint. Starts are those of a real
server with an empty cache folder, and again with what the first has left there; `before` is another checkout of tminus.
Passes take turns in one process. Prints tables and writes large.json.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import networks
from bench.conductor import say
from bench.measures import RESULTS, Findings, Measure
from bench.peers.picture import now_s
from bench.servers import ROOT, Server, cpu_seconds, entry, memory_bytes, options_of, run_json

SETTLE_S = 5.0  # after it is ready, until its memory is read
LIMIT_S = 900.0  # of a process that measures passes
MIB = 2**20


def main() -> None:
    """Measure, print, write."""
    # Being asked to stop must still stop what was started: `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = options_of(__doc__, networks="cifar,celebahq", before=ROOT, rows="1,4", seconds=10.0, out=RESULTS)
    if entry(args.before) is None:
        sys.exit(f"--before {args.before}: no checkout of tminus is there")
    trees = {"tminus": ROOT} | ({"tminus before": args.before.resolve()} if args.before != ROOT else {})
    findings = Findings()
    for name, folder in networks.folders(args.networks).items():
        try:
            theirs = [*first_pass_of_diffusers(folder)]
            findings.add(name, theirs)
            with tempfile.TemporaryDirectory() as parent:
                findings.add(name, starts(folder, trees, Path(parent), theirs[0].value))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            findings.leave_out(f"{name}: starts: {str(error).strip().splitlines()[-1]:.300}")
        for precision in ("float32", "bfloat16"):
            options = {"checkpoint": folder, "precision": precision, "rows": args.rows, "seconds": args.seconds}
            options |= {"float32-too": 1}
            findings.gather(name, f"passes in {precision}", "bench.passes", options, LIMIT_S)
    findings.write(args.out / "large.json", "bench.large")


def first_pass_of_diffusers(folder: Path) -> Iterator[Measure]:
    """Load and run diffusers' network in a process of its own; its wall time is told first."""
    say(f"{folder.name}: diffusers: from_pretrained and a pass")
    began_s = now_s()
    found = run_json("bench.peers.first_pass", ["--checkpoint", str(folder.resolve())], LIMIT_S)
    what = "from_pretrained and a pass of one row"
    yield Measure(what, "diffusers", found["ready_at_s"] - began_s, "s")
    yield Measure(f"{what}, of the processor", "diffusers", found["cpu_s"], "s")
    yield from memory("after a pass of one row", "diffusers", found["memory_bytes"])


def starts(folder: Path, trees: dict[str, Path], parent: Path, diffusers_s: float) -> Iterator[Measure]:
    """Start each checkout twice; gives seconds to readiness, and the peak and resident memory."""
    for of, tree in trees.items():
        for which in ("first", "second"):
            say(f"{folder.name}: {of}: {which} start")
            server = Server(folder, parent / f"{of} {which}", env={"XDG_CACHE_HOME": str(parent / of)}, tree=tree)
            began_s = time.perf_counter()
            try:
                server.start()
                took_s, processor_s = time.perf_counter() - began_s, cpu_seconds(server.pid)
                yield Measure(f"{which} start to readiness", of, took_s, "s")
                yield Measure(f"{which} start / diffusers' from_pretrained and a pass", of, took_s / diffusers_s)
                if processor_s is not None:
                    yield Measure(f"{which} start, of the processor", of, processor_s, "s")
                time.sleep(SETTLE_S)
                yield from memory(f"after the {which} start", of, memory_bytes(server.pid))
            finally:
                server.kill()


def memory(when: str, of: str, peak_and_resident: Sequence[int] | None) -> Iterator[Measure]:
    """Give peak and resident memory, where the system tells them."""
    for name, taken in zip(("peak", "resident"), peak_and_resident or (), strict=False):
        yield Measure(f"{name} memory {when}", of, taken / MIB, "MiB")


if __name__ == "__main__":
    main()
