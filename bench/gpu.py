"""What large networks do on a GPU, beside what others do on the same card, in ten minutes: `make gpu`.

    python -m bench.gpu [--device cuda] [--networks cifar,celebahq,ldm] [--seconds 600] [--out bench/results]

Networks are those of bench/networks.py, with random weights, or folders of checkpoints. For each: passes of tminus'
eager and compiled executor beside diffusers' U-Net run the same way, the memory that they take, an LDM's decoder, ticks
of the engine with --exact and without, and how long a tick takes beside its pass; for the first, servers under a full
load. A part that has no time left is left out, and named. Prints tables and writes gpu-CARD.json.

`--device cpu` tries the same with tiny networks, to see that it works; `--check` only says which card there is.
"""

import argparse
import asyncio
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import figures, networks, result_file, servers
from bench.loads import QUICK, Turn
from bench.measures import Findings, Measure
from bench.result_file import say

LEAST_S = 5.0  # which a process needs to begin
SERVED = ("tminus", "lock", "litserve", "mosec")
# github.com/vllm-project/vllm-omni, issue 5512: `cudnn.deterministic` in a diffusion pipeline on an MI300X.
ANCHOR = "deterministic convolutions cost vllm-omni 61 % more time (a ratio of 0.62), and are not the same over batches"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on a device, and for how long."""

    networks: str
    seconds: float
    rows: str
    precisions: tuple[str, ...]
    compiled_rows: tuple[int, ...]  # of passes that are compiled too, each in a process: it takes a minute
    call_s: float  # for each comparison of passes
    window_s: float  # of each server
    row_steps_per_s: float  # a guess that no server is above by three times


PLANS = {
    "cuda": Plan("cifar,celebahq,ldm", 600.0, "1,8,64,256", ("float32", "tf32", "bfloat16"), (1, 64), 1.5, 8.0, 5000.0),
    "cpu": Plan("tiny,tiny-ldm", 180.0, "1,4", ("float32",), (), 0.2, 1.0, 100.0),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One process, or the servers where it has no module."""

    network: str
    name: str
    weight: float  # of the time
    module: str | None = None
    options: dict[str, Any] | None = None


def main() -> None:
    """Measure, print, write."""
    # Being asked to stop must still stop what was started: `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = parse_args()
    card = card_of(args.device)
    if args.check:
        print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        return
    plan = PLANS[args.device]
    folders = networks.folders(args.networks or plan.networks)
    code = (*result_file.CODE, "bench/passes.py", "bench/ticks.py")  # which are processes of their own
    findings = Findings(result_file.begin(wait=args.device != "cpu", code=code))
    until_s = time.monotonic() + (args.seconds or plan.seconds)
    if not plan.compiled_rows:
        findings.leave_out("what is compiled is not tried on a CPU")
    parts = parts_of(folders, args.device, plan)
    for number, part in enumerate(parts):
        left_s = until_s - time.monotonic()
        limit_s = left_s * part.weight / sum(each.weight for each in parts[number:])
        if limit_s < LEAST_S:
            findings.leave_out(f"{part.network}: {part.name}: no time was left")
        elif part.module is None:
            serve(findings, part.network, folders[part.network], args.device, plan, limit_s)
        else:
            findings.gather(part.network, part.name, part.module, part.options or {}, limit_s)
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    is_quick = args.device == "cpu"
    findings.write(f"gpu-{name}", args.out, quick=is_quick, card=card, cuda=torch.version.cuda, anchor=ANCHOR)
    print(f"Beside exact / not exact: {ANCHOR}.")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(PLANS), default="cuda", help="[cuda]")
    parser.add_argument("--networks", help=f"of {','.join(networks.NETWORKS)}, or folders of checkpoints")
    parser.add_argument("--seconds", type=float, help="for all of it, but for what is begun [600; 180 on a CPU]")
    parser.add_argument("--out", type=Path, help="folder of the file [bench/results; build/bench on a CPU]")
    parser.add_argument("--check", action="store_true", help="say which card there is, and measure nothing")
    return parser.parse_args()


def card_of(device: str) -> str:
    """Return the name of the card. Raises SystemExit where there is none."""
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(f"no GPU: torch {torch.__version__} sees no CUDA device; DEVICE=cpu (--device cpu) tries it without")
    return torch.cuda.get_device_name()


def parts_of(folders: dict[str, Path], device: str, plan: Plan) -> Sequence[Part]:
    """List all there is to measure, what says most first: what is compiled takes the longest and comes last."""
    eager, compiled = [], []
    for name, folder in folders.items():
        options = {"checkpoint": folder, "device": device, "seconds": plan.call_s, "rows": plan.rows}
        for precision in plan.precisions:
            of = options | {"executor": "eager", "precision": precision}
            eager.append(Part(name, f"eager passes in {precision}", 1.0, "bench.passes", of))
        of = options | {"precision": plan.precisions[-1]}
        eager.append(Part(name, f"ticks in {plan.precisions[-1]}", 1.0, "bench.ticks", of))
    for rows in plan.compiled_rows:
        for name, folder in folders.items():
            of = {"checkpoint": folder, "device": device, "seconds": plan.call_s, "rows": rows}
            of |= {"executor": "compile", "precision": plan.precisions[-1]}
            compiled.append(Part(name, f"compiled passes of {rows} rows in {of['precision']}", 1.5, "bench.passes", of))
    return [*eager, Part(next(iter(folders)), "servers", 3.0), *compiled]


def serve(findings: Findings, network: str, folder: Path, device: str, plan: Plan, limit_s: float) -> None:
    """Put each server under more than it can do, of requests of one image. All run eagerly, in float32."""
    until_s = time.monotonic() + limit_s
    lengths = replace(QUICK, warm_up_s=plan.window_s / 2, window_s=plan.window_s)
    flags = ("--executor", "eager", "--precision", "float32")
    known = servers.contenders(1, flags)
    for number, key in enumerate(SERVED):
        contender = replace(known[key], command=(*known[key].command, "--device", device))
        ready_s = max(LEAST_S, (until_s - time.monotonic()) / (len(SERVED) - number) - 1.5 * plan.window_s)
        if why := servers.why_not(contender):
            findings.leave_out(why.removesuffix("."))
            continue
        say(f"{network}: {contender.title}")
        try:
            with servers.running(contender, folder, None, ready_s) as server:
                loaded = asyncio.run(Turn(server, 1, lengths, plan.row_steps_per_s).saturation())
        except (RuntimeError, OSError) as error:
            findings.leave_out(f"{contender.title}: {str(error).strip().splitlines()[-1]:.300}")
            continue
        rate = figures.row_steps_per_s(loaded)
        findings.add(
            network, [Measure("served, saturated by requests of 1 image", contender.title, rate, "row-steps/s")]
        )


if __name__ == "__main__":
    main()
