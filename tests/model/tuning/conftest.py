import dataclasses
from pathlib import Path

import pytest

from tests.model.tuning.nets import NOISE
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Labels, save_checkpoint
from tminus.model.unet import UNet2D


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny network of three classes and a null class."""
    config = dataclasses.replace(TINY, num_class_embeds=4)
    net = UNet2D(config)
    randomize(net)
    save_checkpoint(tmp_path / "net", net.state_dict(), config, NOISE, Labels(("a", "b", "c"), 3), {})
    return tmp_path / "net"
