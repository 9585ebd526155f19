"""The peer at its start: diffusers' `from_pretrained` and one pass. A process that prints one JSON object."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from bench.peers.picture import now_s
from bench.servers import memory_bytes


@torch.inference_mode()
def main() -> None:
    """Load, run, tell when that was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    folder = parser.parse_args().checkpoint
    net: Any = UNet2DModel.from_pretrained(folder, subfolder="unet")  # type: ignore[no-untyped-call]
    side = net.config.sample_size
    net.eval()(torch.zeros(1, net.config.in_channels, side, side), 0)
    found = {"ready_at_s": now_s(), "cpu_s": time.process_time(), "memory_bytes": memory_bytes(os.getpid())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
