"""The training objective L_simple, and the variational bound it stands for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.noise import NoiseSchedule


def training_target(schedule: NoiseSchedule, prediction_type: str, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the network is asked for: eps (Ho et al. 2020), x_0, or v (Salimans & Ho 2022, eq. 10)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return schedule.velocity(x_0, t, eps)
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {prediction_type!r}")


def l_simple(out: Tensor, target: Tensor) -> Tensor:
    """L_simple, the unweighted squared error of the prediction (Ho et al. 2020, eq. 14), in float32."""
    return F.mse_loss(out.to(torch.float32), target)
