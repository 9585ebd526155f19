"""Run the benchmark: tminus and its peers on one checkpoint, taking turns on one machine, in one run.

    python -m bench                              everything, forty minutes
    python -m bench --only idle,saturation       some loads
    python -m bench --before ../old              the code of another checkout too, in the same run
    python -m bench --quick                      to see that it works; the figures mean nothing
    python -m bench --docs                       also put the results into docs/
    python -m bench --render --docs              the same with the last run's records, without running

Each contender is a process of its own and has the machine to itself. Traffic stays on 127.0.0.1.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report, servers
from bench.conductor import LOADS, Conductor, say
from bench.plot import plot
from bench.records import Run

RESULTS = Path(__file__).parent / "results"
DOCS = servers.ROOT / "docs"


def main() -> None:
    """Parse, measure, print, write."""
    args = parse_args(sys.argv[1:])
    # Being asked to stop must still stop the servers: their `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run = report.from_json((args.out / "latest.json").read_bytes()) if args.render else measure(args)
    report.write(run, args.out)
    print(report.to_markdown(run))
    pictures = [args.out / "latest.svg", *([DOCS / "images" / "bench.svg"] if args.docs else [])]
    try:
        for picture in pictures:
            plot(run, picture)
    except ImportError:
        say("no picture: matplotlib is not installed")
    if args.docs:
        page = DOCS / "benchmarks.md"
        page.write_text(report.into_page(page.read_text("utf-8"), report.to_markdown(run)), "utf-8")
    say(f"took {run.seconds:.0f} s; written to {args.out}/latest.json, .md and .svg")


def measure(args: argparse.Namespace) -> Run:
    """Run all that was asked for. tminus finds its executor anew: what it found on a busy day must not count."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        return Conductor(args).run()


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    known = list(servers.contenders(1))
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--only", type=_names(LOADS), default=LOADS, help=f"loads, of {','.join(LOADS)}")
    parser.add_argument("--contenders", type=_names(known), default=known, help=f"of {','.join(known)}")
    parser.add_argument("--before", type=_checkout, help="another checkout of tminus, to compare with in the same run")
    parser.add_argument("--rounds", type=int, help="turns of all contenders [3]")
    parser.add_argument("--threads", type=int, help="CPU threads of tminus, the lock and the bare loop [torch's own]")
    parser.add_argument(
        "--tminus-flags",
        type=shlex.split,
        default=[],
        help="more for `tminus serve`: --tminus-flags='--precision bfloat16'",
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--docs", action="store_true", help="put the results into docs/benchmarks.md and docs/images/")
    parser.add_argument("--render", action="store_true", help="write the last run's results again, without running")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results [bench/results]")
    args = parser.parse_args(arguments)
    if args.before is not None:
        args.contenders = ["before", *args.contenders]
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
