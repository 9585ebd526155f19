"""Networks of a hundred million parameters on this machine: start, memory, and a pass, beside diffusers.

    python -m bench.large [--networks cifar,celebahq] [--before ../old] [--rows 1,4] [--out bench/results]

A network is one of bench/networks.py, with random weights, or the folder of a checkpoint. Starts are those of a real
server with an empty cache folder, and again with what the first has left there; `before` is another checkout of tminus.
Passes take turns in one process. Prints tables and writes large.json.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import networks
from bench.conductor import say
from bench.measures import RESULTS, Findings, Measure
from bench.peers.picture import now_s
from bench.servers import ROOT, Server, options_of, run_json

SETTLE_S = 5.0  # after it is ready, until its memory is read
PASSES_LIMIT_S = 900.0
MIB = 2**20


def main() -> None:
    """Measure, print, write."""
    args = options_of(__doc__, networks="cifar,celebahq", before=ROOT, rows="1,4", seconds=10.0, out=RESULTS)
    trees = {"tminus": ROOT} | ({"tminus before": args.before.resolve()} if args.before != ROOT else {})
    findings = Findings()
    for name, folder in networks.folders(args.networks).items():
        with tempfile.TemporaryDirectory() as parent:
            findings.add(name, starts(folder, trees, Path(parent)))
        findings.add(name, first_pass_of_diffusers(folder))
        for precision in ("float32", "bfloat16"):
            options = {"checkpoint": folder, "precision": precision, "rows": args.rows, "seconds": args.seconds}
            options |= {"float32-too": 1}
            findings.gather(name, f"passes in {precision}", "bench.passes", options, PASSES_LIMIT_S)
    findings.write(args.out / "large.json", "bench.large")


def starts(folder: Path, trees: dict[str, Path], parent: Path) -> Iterator[Measure]:
    """Start each checkout twice; gives seconds to readiness, and the peak and resident memory."""
    for of, tree in trees.items():
        cache = parent / of
        for number, which in enumerate(("first", "second")):
            say(f"{folder.name}: {of}: {which} start")
            server = Server(folder, parent / f"{of} {number}", env={"XDG_CACHE_HOME": str(cache)}, tree=tree)
            began_s = time.perf_counter()
            try:
                server.start()
                yield Measure(f"{which} start to readiness", of, time.perf_counter() - began_s, "s")
                time.sleep(SETTLE_S)
                yield from memory(f"after the {which} start", of, server.memory_bytes)
            finally:
                server.kill()


def first_pass_of_diffusers(folder: Path) -> Iterator[Measure]:
    """Load and run diffusers' network in a process of its own."""
    say(f"{folder.name}: diffusers: from_pretrained and a pass")
    began_s = now_s()
    found = run_json("bench.peers.first_pass", ["--checkpoint", str(folder.resolve())], PASSES_LIMIT_S)
    yield Measure("from_pretrained and a pass of one row", "diffusers", found["ready_at_s"] - began_s, "s")
    yield from memory("after a pass of one row", "diffusers", found["memory_bytes"])


def memory(when: str, of: str, peak_and_resident: tuple[int, int] | None) -> Iterator[Measure]:
    """What the system tells; nothing where it does not."""
    for name, taken in zip(("peak", "resident"), peak_and_resident or (), strict=False):
        yield Measure(f"{name} memory {when}", of, taken / MIB, "MiB")


if __name__ == "__main__":
    main()
