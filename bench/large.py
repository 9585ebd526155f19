"""Networks beside the bundled one: a larger one, and a latent one. Writes bench/results/networks.json.

    python -m bench.large [--networks cifar,checkpoints/avatars-64] [--quick 1]

A network is one of bench/networks.py, with random weights, or the folder of a checkpoint. tminus runs it beside
LitServe with the same graph and precision, and beside LitServe with diffusers' network in eager float32. Also how long
a server takes to start, with an empty cache folder and again, and the memory that it needs. This takes a quarter of an
hour on two cores.
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import figures, networks, result_file, servers
from bench.bare import flops_per_row
from bench.conductor import Conductor, Plan
from bench.figures import SHORT_STEPS
from bench.loads import QUICK, Lengths
from bench.records import Ask
from bench.result_file import say
from tminus.model.checkpoint import load_checkpoint

CONTENDERS = ("tminus", "litserve_openvino", "litserve")
LOADS = ("idle", "saturation_1", "mixed", "bare")
SETTLE_S = 4.0  # after a server is ready, until its memory is read
MIXED_S = 24.0  # that the long jobs of the mixed load are to take, on a machine of GFLOP_PER_S
GFLOP_PER_S = 500.0
LENGTHS = Lengths(
    rounds=1,
    idle_requests=5,
    window_s=14.0,
    trial_s=5.0,
    bare_s=8.0,  # a pass may take a second
    mixed_s=20.0,
    mixed_long_at_s=(0.0, 2.0),
    shorts_per_s=0.4,
)
TITLES = {"cifar": "google/ddpm-cifar10-32, random weights", "avatars-64": "avatars-64, latent"}
MIB = 2**20


def main() -> None:
    """Measure, write."""
    # Being asked to stop must still stop what was started: `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = servers.options_of(
        __doc__, networks="cifar,checkpoints/avatars-64", contenders=",".join(CONTENDERS), quick=0,
        out="",
    )  # fmt: skip
    begun = result_file.begin(wait=not args.quick)
    machine = servers.describe(0.2 if args.quick else 1.0)
    found: dict[str, Any] = {}
    for name, folder in networks.folders(args.networks).items():
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            found[name] = measured(folder, args.contenders.split(","), machine, quick=bool(args.quick))
    left_out = [f"{name}: {sentence}" for name, each in found.items() for sentence in each.pop("left_out", [])]
    made = begun.made(machine, quick=bool(args.quick))
    result_file.write("networks", made, found | {"left_out": left_out}, args.out)


def measured(folder: Path, contenders: list[str], machine: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Measure one network. The cache folder is empty before."""
    checkpoint = load_checkpoint(folder)
    gflop = flops_per_row(checkpoint) / 1e9
    steps = max(SHORT_STEPS, min(1000, 10 * round(MIXED_S * GFLOP_PER_S / gflop / 16 / 10)))
    lengths = replace(QUICK if quick else LENGTHS, mixed_long=Ask(n=8, steps=SHORT_STEPS if quick else steps))
    found: dict[str, Any] = {
        "title": TITLES.get(folder.name, folder.name),
        "parameters_m": sum(each.numel() for each in checkpoint.net.parameters()) / 1e6,
        "gflop_a_row": gflop,
        "long_steps": lengths.mixed_long.steps,
    }
    for key in ("start_s", "second_start_s"):
        say(f"{folder.name}: {key}")
        with tempfile.TemporaryDirectory() as state:
            server = servers.Server(folder, Path(state))
            began_s = time.perf_counter()
            try:
                server.start()
                found[key] = time.perf_counter() - began_s
                time.sleep(0 if quick else SETTLE_S)
                if (memory := servers.memory_bytes(server.pid)) is not None:
                    found["peak_memory_mib"], found["memory_mib"] = (each / MIB for each in memory)
            finally:
                server.kill()
    run = Conductor(Plan(folder, contenders, LOADS, lengths)).run()
    summary = figures.summary(run, machine["peaks_gflop_per_s"])
    limits = summary.get("limits", {})
    return found | {
        "executor": summary["tminus"]["executor"],
        "precision": summary["tminus"]["precision"],
        "setups": summary.get("setups"),
        "trials": summary.get("trials"),
        "idle": summary.get("idle"),
        "saturation": summary.get("saturation_1"),
        "short": summary.get("short"),
        "long": summary.get("long"),
        "bare": limits.get("bare", {}).get(str(run.places)),
        "bare_of_peak": limits.get("bare_of_peak"),
        "of_peak": limits.get("tminus_of_peak"),
        "left_out": run.left_out,
    }


if __name__ == "__main__":
    main()
