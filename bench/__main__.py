"""Run the benchmark: the bare loop, tminus and a lock around DDPMPipeline, taking turns; a table and two files.

    python -m bench [--quick] [--rounds 3] [--seconds 12]

Each contender is a process of its own and has the machine to itself. Traffic stays on 127.0.0.1.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import load, servers
from bench.pace import Pace
from bench.report import Round, Run, to_markdown, write

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 4, 8, 16)
IDLE = load.Ask(n=1, steps=50)


def main() -> None:
    """Parse, measure, print, write."""
    args = parse_args(sys.argv[1:])
    # Being asked to stop must still stop the servers: their `finally` runs only on an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started, load_average = time.monotonic(), os.getloadavg()[0]
    machine: dict[str, Any] = {}
    flops_per_row = 0
    rounds = []
    for number in range(1, args.rounds + 1):
        bare, turn = run_round(args, f"round {number}/{args.rounds}")
        machine, flops_per_row = bare["machine"], bare["flops_per_row"]
        rounds.append(turn)
    run = Run(
        command=" ".join(["python -m bench", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit(),
        load_average=load_average,
        checkpoint=args.checkpoint.name,
        machine=machine,
        flops_per_row=flops_per_row,
        max_batch=args.max_batch,
        idle_steps=IDLE.steps,
        settings={name: value for name, value in vars(args).items() if name != "checkpoint"},
        rounds=tuple(rounds),
    )
    write(run, RESULTS)
    print(to_markdown(run))
    say(f"took {time.monotonic() - started:.0f} s; written to bench/results/latest.json and .md")


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; --quick is a smoke run whose figures mean nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/fashion-mnist-32"))
    parser.add_argument("--rounds", type=int, help="turns of all contenders [3]")
    parser.add_argument("--seconds", type=float, help="length of a window at full load [12]")
    parser.add_argument("--idle-requests", type=int, help="requests for the idle latency, a server and round [12]")
    parser.add_argument("--max-batch", type=int, default=16, help="places in a tick of tminus [16]")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight at full load [8]")
    parser.add_argument("--threads", type=int, help="CPU threads of each contender [torch's own]")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    args = parser.parse_args(arguments)
    defaults = {"rounds": 1, "seconds": 2.0, "idle_requests": 2} if args.quick else {}
    for name, value in ({"rounds": 3, "seconds": 12.0, "idle_requests": 12} | defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (args.rounds >= 1 and args.seconds > 0 and args.idle_requests >= 1 and args.clients >= 1):
        parser.error("--rounds, --seconds, --idle-requests and --clients must be positive")
    return args


def run_round(args: argparse.Namespace, title: str) -> tuple[dict[str, Any], Round]:
    """One turn of every contender; also gives all that the bare loop said."""
    say(f"{title}: bare loop")
    batches = sorted({*BATCHES, args.max_batch})
    bare = servers.bare(args.checkpoint, batches, args.seconds / 3, args.threads)

    say(f"{title}: tminus")
    with servers.tminus(args.checkpoint, args.max_batch, args.threads) as url:
        tminus_idle_s = asyncio.run(load.idle_latencies(url, IDLE, load.send_to_tminus, args.idle_requests))
        mixed = _tminus_load(args, url, load.mixed_asks())
        unguided = _tminus_load(args, url, load.unguided_asks())

    say(f"{title}: lock around DDPMPipeline")
    with servers.lock_server(args.checkpoint, args.threads) as url:
        lock_idle_s = asyncio.run(load.idle_latencies(url, IDLE, load.send_to_lock, args.idle_requests))
        lock = asyncio.run(
            load.full_load(
                url,
                load.unguided_asks(),
                load.send_to_lock,
                load.read_lock,
                clients=args.clients,
                warm_up_s=_warm_up_s(args),
                seconds=args.seconds,
            )
        )
    paces = {int(batch): Pace(**pace) for batch, pace in bare["bare"].items()}
    turn = Round(bare["matmul_flops"], bare["conv_flops"], paces, mixed, unguided, lock, tminus_idle_s, lock_idle_s)
    return bare, turn


def _tminus_load(args: argparse.Namespace, url: str, asks: list[load.Ask]) -> load.Loaded:
    return asyncio.run(
        load.full_load(
            url,
            asks,
            load.send_to_tminus,
            load.read_tminus,
            clients=args.clients,
            warm_up_s=_warm_up_s(args),
            seconds=args.seconds,
        )
    )


def _warm_up_s(args: argparse.Namespace) -> float:
    return float(min(2.0, args.seconds / 2))


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Tell progress, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
