"""Measure tminus beside its peers: one checkpoint, one machine, in turns. Writes bench/results/serving.json.

    python -m bench                              everything, an hour and a half on two cores
    python -m bench --only idle,saturation_1     some loads
    python -m bench --before ../old              the code of another checkout too, in the same run
    python -m bench --quick                      to see that it works; the figures mean nothing
    python -m bench --summarise                  make the file again from the records of the last full run

Each contender is a process of its own and has the machine to itself. Traffic stays on 127.0.0.1. build/bench/ has the
records of each request, and the file of a quick run. `make figures` puts the figures into the pages.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bench import figures, result_file, servers
from bench.conductor import LOADS, Conductor, Plan
from bench.loads import QUICK, Lengths
from bench.records import Run

RECORDS = result_file.TRIALS / "serving-records.json"
ARITHMETIC = "service/cli/bench.py"  # of the load slo
Records = tuple[dict[str, Any], Run]  # how the run was made, and what it found


def main() -> None:
    """Parse, measure, write."""
    args = parse_args(sys.argv[1:])
    # Being asked to stop must still stop the servers: their `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    records = TypeAdapter(Records)
    if args.summarise:
        made, run = records.validate_json(RECORDS.read_bytes())
    else:
        made, run = measure(args)
        if not args.quick:
            RECORDS.parent.mkdir(parents=True, exist_ok=True)
            RECORDS.write_bytes(records.dump_json((made, run)))
    result_file.write("serving", made, figures.summary(run, made["machine"]["peaks_gflop_per_s"]), args.out)


def measure(args: argparse.Namespace) -> Records:
    """Run all that was asked for. tminus finds its executor anew: what it found on a busy day must not count."""
    begun = result_file.begin(wait=not args.quick, code=(*result_file.CODE, ARITHMETIC))
    machine = servers.describe(peak_s=0.2 if args.quick else 1.0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        run = Conductor(plan_of(args)).run()
    return begun.made(machine, quick=args.quick), run


def plan_of(args: argparse.Namespace) -> Plan:
    """Make the plan of a command line."""
    lengths = QUICK if args.quick else Lengths()
    if args.rounds is not None:
        lengths = replace(lengths, rounds=args.rounds)
    contenders = (["before"] if args.before is not None else []) + args.contenders
    return Plan(args.checkpoint, contenders, args.only, lengths, args.threads, args.tminus_flags, args.before)


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    known = list(servers.contenders(1))
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=servers.CHECKPOINT)
    parser.add_argument("--only", type=_names(LOADS), default=LOADS, help=f"loads, of {','.join(LOADS)}")
    parser.add_argument("--contenders", type=_names(known), default=known, help=f"of {','.join(known)}")
    parser.add_argument("--before", type=_checkout, help="another checkout of tminus, to compare with in the same run")
    parser.add_argument("--rounds", type=int, help="turns of all contenders [2]")
    parser.add_argument("--threads", type=int, help="CPU threads of tminus, the lock and the bare loop [torch's own]")
    parser.add_argument(
        "--tminus-flags",
        type=shlex.split,
        default=[],
        help="more for `tminus serve`: --tminus-flags='--precision bfloat16'",
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--summarise", action="store_true", help="make the file from the last full run's records")
    parser.add_argument("--out", type=Path, help="folder of the file [bench/results; build/bench if quick]")
    args = parser.parse_args(arguments)
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be positive")
    return args


def _checkout(text: str) -> Path:
    folder = Path(text).resolve()
    if servers.entry(folder) is None:
        raise argparse.ArgumentTypeError(f"{text}: no checkout of tminus is there")
    return folder


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: known are {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
