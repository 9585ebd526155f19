"""openvino's own reporting over the network stays off."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")

PROGRAM = """
import sys
import torch
from model.unet import UNet2D
from tests.tiny import TINY
from service.engine.openvino_executor import Graph
Graph(UNet2D(TINY), (1, 16, 16), 10)
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
"""


def test_nothing_is_told_to_the_makers_of_openvino(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env={"HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
