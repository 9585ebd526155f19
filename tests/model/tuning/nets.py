"""A tiny network, and a fitter of it."""

import dataclasses
from pathlib import Path

import torch

from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Checkpoint, Labels, save_checkpoint
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig
from tminus.model.tuning.fit import Fitter
from tminus.model.tuning.tune import TuneConfig, make_rows
from tminus.model.unet import UNet2D

CPU = torch.device("cpu")
NOISE = NoiseConfig(num_train_timesteps=50, beta_end=0.1)
EDM = NoiseConfig(50, prediction_type="edm", default_sampler="euler", clip_sample=False)
CONFIG = TuneConfig(rows=12, held_out=4, teacher="dpmpp_2m:25", batch_size=8, iterations=3)


def save_net(folder: Path) -> Path:
    """A tiny network of three classes and a null class."""
    config = dataclasses.replace(TINY, num_class_embeds=4)
    net = UNet2D(config)
    randomize(net)
    save_checkpoint(folder, net.state_dict(), config, NOISE, Labels(("a", "b", "c"), 3), {})
    return folder


def fitter_of(
    checkpoint: Checkpoint, config: TuneConfig = CONFIG, guidance: float = 1.0, forward: Forward | None = None
) -> Fitter:
    rows = make_rows(checkpoint, config.seed, range(config.rows + config.held_out), guidance, CPU)
    fitter = Fitter(checkpoint, forward or checkpoint.net, rows, guidance, held_out=config.held_out, batch_size=5)
    fitter.solve(checkpoint.plan("dpmpp_2m", 25, spacing="trailing"))
    return fitter
