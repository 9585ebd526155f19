"""What it takes to load a large checkpoint: a folder of 114 million parameters, against reading the file plainly.

    python -m bench.load [--rounds 5]

Plainly is safetensors' own `load_file`, the network built, and its weights loaded into it; barely is the same with a
network that has no values before. tminus reads the same, and checks shapes, values and hash besides. Each in a process
of its own, in turns; memory is the peak above what was there before.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.servers import options_of
from bench.streams import show

LEVELS = 6
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Measure and print; with --one, load once."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(load(sys.argv[2], Path(sys.argv[3]))))
        return
    args = options_of(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "large"
        save(folder)
        size = (folder / WEIGHTS).stat().st_size
        found: dict[str, list[tuple[float, float]]] = {"tminus": [], "plain": [], "bare": []}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            for how, results in found.items():
                command = [sys.executable, "-m", "bench.load", "--one", how, str(folder)]
                seconds, peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                results.append((seconds, peak / size))
    print(f"{size / 2**20:.0f} MiB of weights\n\n| what | | range |\n|---|---|---|")
    for name, other in (("plainly", "plain"), ("barely", "bare")):
        pairs = zip(found["tminus"], found[other], strict=True)
        show(f"time to load: tminus / {name}", [ours[0] / theirs[0] for ours, theirs in pairs])
    for how, results in found.items():
        show(f"{how}: s", [seconds for seconds, _ in results])
        show(f"{how}: peak memory / weights", [peak for _, peak in results])


def save(folder: Path) -> None:
    """The network of Ho et al. for 256x256, of random weights."""
    import torch

    from tminus.model.checkpoint import Labels, save_checkpoint
    from tminus.model.noise import NoiseConfig
    from tminus.model.unet import UNet2D, UNetConfig

    down = tuple("AttnDownBlock2D" if level == 4 else "DownBlock2D" for level in range(LEVELS))
    up = tuple("AttnUpBlock2D" if level == 1 else "UpBlock2D" for level in range(LEVELS))
    config = UNetConfig(
        sample_size=256, in_channels=3, out_channels=3, down_block_types=down, up_block_types=up,
        block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2,
    )  # fmt: skip
    config = replace(config, attention_head_dim=None)
    net = UNet2D(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.02)
    save_checkpoint(folder, net.state_dict(), config, NoiseConfig(), Labels(), {})


def load(how: str, folder: Path) -> tuple[float, float]:
    """Load it; how long that took, and how much memory it took at most, in bytes."""
    import torch
    from safetensors.torch import load_file

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.unet import UNet2D, UNetConfig

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    began_s = time.perf_counter()
    if how == "tminus":
        net = load_checkpoint(folder).net
    else:
        config = json.loads((folder / "unet" / "config.json").read_text())
        with torch.device("meta" if how == "bare" else "cpu"):
            net = UNet2D(UNetConfig.from_dict(config))
        net.load_state_dict(load_file(folder / WEIGHTS), assign=how == "bare")
    total = sum(float(parameter.sum()) for parameter in net.parameters())  # the file may be mapped: read it all
    assert total == total
    seconds = time.perf_counter() - began_s
    return seconds, peak_bytes() - before


def peak_bytes() -> float:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
