"""Training targets, made from x_0 and noise, from a mean of images, or by a guided teacher."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.guidance import Forward, guided
from tminus.model.latent.autoencoder import Autoencoder, hash_autoencoder
from tminus.model.loss import training_target
from tminus.model.noise import NoiseConfig, NoiseSchedule, gather
from tminus.model.training.data import Examples
from tminus.model.training.run import TrainError
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

GROUP = 256  # images at most; larger groups read more data per step, and the target hardly varies less


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: x_0, eps and x_t [B, C, H, W], t [B], and class_labels [B] or None.

    `picked` holds the index of each row's image in the data, int64 [B] on the CPU.
    """

    x_0: Tensor
    t: Tensor
    eps: Tensor
    x_t: Tensor
    class_labels: Tensor | None
    picked: Tensor


Target = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True)
class PlainTarget:
    """The usual target: eps as in Ho et al. 2020, or the equivalent for other prediction types."""

    noise: NoiseConfig
    schedule: NoiseSchedule

    def __call__(self, batch: Batch) -> Tensor:
        return training_target(self.noise, self.schedule, batch.x_0, batch.t, batch.eps)


class StableTarget:
    """The target with x_0 replaced by a mean of training images, which varies less (Xu et al. 2023, STF).

    The training images are divided into groups, each of a single class. The mean is E[x_0 | x_t, group], over the group
    of the row's own image. For any grouping, its expectation given x_t is that of x_0, so the same network minimises
    the loss. The target varies little near t = T, where any image could have led to x_t. Near t = 0, the mean is x_0
    itself.
    """

    def __init__(self, examples: Examples, noise: NoiseConfig, schedule: NoiseSchedule) -> None:
        """The examples must be on the schedule's device."""
        self._examples, self._noise, self._schedule = examples, noise, schedule
        labels, count = examples.class_labels, len(examples.x_0)
        of_class = torch.zeros(count, dtype=torch.int64) if labels is None else labels.cpu()
        self._groups: list[Tensor] = []
        self._group_of = torch.empty_like(of_class)  # on the host, so that steps do not wait for the device
        for label in sorted(set(of_class.tolist())):
            members = (of_class == label).nonzero()[:, 0]
            for part in members.tensor_split(-(-len(members) // GROUP)):
                self._group_of[part] = len(self._groups)
                self._groups.append(part.to(examples.x_0.device))

    def __call__(self, batch: Batch) -> Tensor:
        return training_target(self._noise, self._schedule, *self.explain(batch))

    def explain(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return E[x_0 | x_t, group] as x_0, t, and the eps that gives x_t with this x_0."""
        mean = self.mean(batch.x_t, batch.t, batch.picked)
        signal, noise = self._schedule.alpha_bar.sqrt(), (1 - self._schedule.alpha_bar).sqrt()
        return mean, batch.t, batch.eps + gather(signal / noise, batch.t, batch.x_0) * (batch.x_0 - mean)

    def mean(self, x_t: Tensor, t: Tensor, picked: Tensor) -> Tensor:
        """Return E[x_0 | x_t, group of the picked image], float32 [B, C, H, W], for t and picked [B]."""
        mean = torch.empty_like(x_t, dtype=torch.float32)
        groups = self._group_of[picked]
        alpha_bar = self._schedule.alpha_bar[t].to(torch.float32)[:, None]
        for group in sorted(set(groups.tolist())):
            rows = (groups == group).nonzero()[:, 0].to(x_t.device)
            images = self._examples.rows(self._groups[group]).to(torch.float32).flatten(1)
            a = alpha_bar[rows]
            # -|x_t - alpha x_0|^2 / (2 sigma^2), without the terms that are the same for all x_0
            logits = (a.sqrt() * (x_t[rows].flatten(1) @ images.T) - a / 2 * images.square().sum(1)) / (1 - a)
            mean[rows] = (logits.softmax(1) @ images).view_as(mean[rows])
        return mean


@dataclass(frozen=True, slots=True)
class GuidedTarget:
    """A frozen teacher's prediction with classifier-free guidance, which the network learns to include.

    See Meng et al. 2023, On Distillation of Guided Diffusion Models, sec. 3.1.
    """

    teacher: Forward
    null_class: int | None
    guidance: float
    autocast: AbstractContextManager[object]

    def __call__(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.autocast:
            out = guided(self.teacher, batch.x_t, batch.t, batch.class_labels, self.null_class, self.guidance)
            return out.to(torch.float32)


def product_of(guidance: float, teacher: Checkpoint) -> float:
    """Return the total guidance in the trained weights: `guidance` times that in the teacher's weights."""
    return round(guidance * teacher.folded_guidance, 6)


def teacher_of(net: UNet2D) -> UNet2D:
    """Return a frozen copy of a network, before it is trained."""
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
    """Raise TrainError if this network cannot learn the teacher's prediction."""

    def require_same(field: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            differs = f"has {field} {theirs!r}, and a run with guidance must have the same, got {ours!r}"
            raise TrainError(f"{folder}: {differs}")

    if teacher.labels.null_class is None:
        raise TrainError(f"{folder}: has no null class, and a run with guidance needs one")
    require_same("class_names", teacher.labels.class_names, class_names)
    theirs, ours = ({**each.to_dict(), "dropout": 0.0} for each in (teacher.net.config, unet))
    for field in ours:
        require_same(field, theirs[field], ours[field])
    require_same("prediction_type", teacher.noise.prediction_type, noise.prediction_type)
    if not teacher.noise.schedule().betas.equal(noise.schedule().betas):
        fields = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
        require_same(
            "noise schedule", *({name: getattr(each, name) for name in fields} for each in (teacher.noise, noise))
        )
    hashes = (None if each is None else hash_autoencoder(each)[:16] for each in (teacher.autoencoder, autoencoder))
    require_same("autoencoder", *hashes)
