import pytest
import torch

from tests.tiny import TINY, randomize
from tminus.model.unet import UNet2D

# These nets are too small to gain by threads, and on a busy machine threads that wait for one another take minutes.
torch.set_num_threads(1)


@pytest.fixture
def tiny_net() -> UNet2D:
    """An unconditional one-channel 8x8 U-Net with random weights, in eval mode."""
    net = UNet2D(TINY)
    randomize(net)
    return net.requires_grad_(False).eval()
