"""The losses of the recipe in docs/training.md, from random weights, beside those of the bundled weights.

    python -m bench.training                 train in a temporary folder, and write bench/results/training.json
    python -m bench.training --run FOLDER    train there; a run that is there goes on, and one that is done is read

The losses are those on images that no run learned from, with the same timesteps and noise each time. They do not depend
on the machine's speed, so a busy machine may make the file.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import result_file, servers
from tminus.model.checkpoint import load_checkpoint
from tminus.model.training.data import FASHION_MNIST_DIR, Examples, load_fashion_mnist
from tminus.model.training.held_out import LOSSES_FILE, MEASURED, mean_loss

STEPS, SHEET_EVERY = 400, 200
RECIPE = ("--optimizer", "muon", "--steps", str(STEPS), "--sheet-every", str(SHEET_EVERY))  # as the page prints it


def main() -> None:
    """Train, measure and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of the run  [default: a temporary one]")
    args = parser.parse_args()
    begun = result_file.begin(wait=False)
    with tempfile.TemporaryDirectory() as temporary:
        run = args.run or Path(temporary) / "run"
        if f"step_{STEPS}" not in losses(run):
            train = [sys.executable, "-m", "tminus", "train", "--data", "fashion-mnist", "--out", str(run)]
            subprocess.run([*train, *RECIPE], check=True)
        figures = {"held_out": {**losses(run), "bundled": bundled()}}
    result_file.write("training", begun.made(servers.describe(0), timed=False), figures)


def losses(run: Path) -> dict[str, float]:
    """Read the loss on held-out images by step, as far as the run has come."""
    if not (run / LOSSES_FILE).is_file():
        return {}
    with (run / LOSSES_FILE).open(encoding="utf-8") as file:
        return {f"step_{row['step']}": float(row["held_out"]) for row in csv.DictReader(file)}


def bundled() -> float:
    """Measure the loss of the bundled weights on the same images."""
    checkpoint: Any = load_checkpoint(servers.CHECKPOINT)
    schedule = checkpoint.noise.schedule()
    examples = Examples.some_of(load_fashion_mnist("test", FASHION_MNIST_DIR), MEASURED, None, schedule.betas.device)
    return mean_loss(checkpoint.net, examples, MEASURED, checkpoint.noise, schedule)


if __name__ == "__main__":
    main()
