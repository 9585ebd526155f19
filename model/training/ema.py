"""The exponential moving average of the weights; samples are drawn from it (Ho et al. 2020, appendix B)."""

import torch
from torch import Tensor, nn


class Ema:
    """Averaged weights in float32. The decay warms up as (1 + step) / (10 + step), to forget the initial weights."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move the average towards the weights after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = net.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [state[k] for k in self.shadow], 1 - decay)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Load a saved average. Raises ValueError unless its keys are the same."""
        if shadow.keys() != self.shadow.keys():
            raise ValueError("the saved average belongs to another network")
        for key, value in shadow.items():
            self.shadow[key].copy_(value)
