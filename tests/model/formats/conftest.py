from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no initialisation zeroes, small enough for a net of this depth."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            of_norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(
                1 + 0.1 * noise if of_norm else noise / max(1, value[0].numel() if value.ndim > 1 else 10) ** 0.5
            )
    return net.eval()


def save(net: nn.Module, file: Path) -> Path:
    torch.save(net.state_dict(), file)
    return file


def close_to_scale(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    """Within a share of the output's scale, and the output is not trivial."""
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(4, 3, 16, 16, generator=generator), "t": torch.tensor([0, 3, 500, 999])}
