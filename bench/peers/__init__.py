"""What tminus is measured against, each a process of its own: what a careful user of that project would write."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def arguments(text: str | None) -> argparse.Namespace:
    """Read the command line that every peer is given; a peer leaves what is its library's alone."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tally", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--openvino", metavar="PRECISION", help="run tminus' own graph with OpenVINO [eager PyTorch]")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--way", choices=("batches", "steps", "queues"), default="batches", help="of LitServe")
    return parser.parse_known_args()[0]


def encode(images: Sequence[Image.Image]) -> bytes:
    """Make a peer's answer: one PNG, the images side by side."""
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (width * len(images), height))
    for k, image in enumerate(images):
        sheet.paste(image, (k * width, 0))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
