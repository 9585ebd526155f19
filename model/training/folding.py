"""Guidance folded into weights (Meng et al. 2023, On Distillation of Guided Diffusion Models, sec. 3.1).

The network learns what frozen weights, its teacher, predict with classifier-free guidance.
"""

import copy
from pathlib import Path
from typing import cast

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.latent.folder import hash_autoencoder
from tminus.model.noise import NoiseConfig
from tminus.model.training.run import TrainError
from tminus.model.unet import UNet2D, UNetConfig


def product_of(guidance: float, teacher: Checkpoint) -> float:
    """The guidance of a network that learns a teacher's with `guidance`: it multiplies what the teacher has in it."""
    return round(guidance * teacher.folded_guidance, 6)


def teacher_of(net: UNet2D) -> UNet2D:
    """A frozen copy of a network that is about to be trained."""
    teacher = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(UNet2D, teacher).requires_grad_(False).eval()


def check_teacher(
    folder: Path,
    teacher: Checkpoint,
    unet: UNetConfig,
    noise: NoiseConfig,
    class_names: tuple[str, ...],
    autoencoder: Autoencoder | None,
) -> None:
    """Raise TrainError unless what it predicts, guided, is a target for this network: else nothing would correct it."""
    if teacher.labels.null_class is None:
        raise TrainError(f"{folder}: has no null class, and a run with guidance needs one")
    if teacher.labels.class_names != class_names:
        raise _unlike(folder, "class_names", teacher.labels.class_names, class_names)
    theirs, ours = ({**each.to_dict(), "dropout": 0.0} for each in (teacher.net.config, unet))
    for field in ours:
        if theirs[field] != ours[field]:
            raise _unlike(folder, field, theirs[field], ours[field])
    if teacher.noise.prediction_type != noise.prediction_type:
        raise _unlike(folder, "prediction_type", teacher.noise.prediction_type, noise.prediction_type)
    if not teacher.noise.schedule().betas.equal(noise.schedule().betas):
        fields = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
        their_noise, our_noise = ({name: getattr(each, name) for name in fields} for each in (teacher.noise, noise))
        raise _unlike(folder, "noise schedule", their_noise, our_noise)
    their_hash, our_hash = (
        None if each is None else hash_autoencoder(each)[:16] for each in (teacher.autoencoder, autoencoder)
    )
    if their_hash != our_hash:
        raise _unlike(folder, "autoencoder", their_hash, our_hash)


def _unlike(folder: Path, field: str, theirs: object, ours: object) -> TrainError:
    return TrainError(f"{folder}: has {field} {theirs!r}, and a run with guidance must have the same, got {ours!r}")
