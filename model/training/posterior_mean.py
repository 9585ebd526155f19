"""The mean of x_0 given x_t over training images: a target with little noise (Stable Target Field, Xu et al. 2023).

The images are cut into groups of one class. E[x_0 | x_t, group] has the same mean given x_t as x_0 has, whatever the
groups are, so the same network minimises the loss. Near t = T, where an x_t may come from any image, it hardly varies;
near t = 0 it is x_0 itself.
"""

import torch
from torch import Tensor

from tminus.model.noise import NoiseSchedule, gather
from tminus.model.pixels import to_model_range

GROUP = 256  # images at most: with more, a step reads more of the data, and the target varies hardly less


class PosteriorMean:
    """Of training data x_0 [N, C, H, W], uint8 pixels or latents, with labels [N] or None, on the schedule's device."""

    def __init__(self, origins: Tensor, labels: Tensor | None, schedule: NoiseSchedule) -> None:
        self._origins, self._schedule = origins, schedule
        of_class = torch.zeros(len(origins), dtype=torch.int64) if labels is None else labels.cpu()
        self._groups: list[Tensor] = []
        self._group_of = torch.empty_like(of_class)  # on the host, which knows the batch, so that no step waits for it
        for label in sorted(set(of_class.tolist())):
            members = (of_class == label).nonzero()[:, 0]
            for part in members.tensor_split(-(-len(members) // GROUP)):
                self._group_of[part] = len(self._groups)
                self._groups.append(part.to(origins.device))

    def explain(self, x_t: Tensor, t: Tensor, picked: Tensor, x_0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps by other x_0 and eps: E[x_0 | x_t, group], and its eps.

        x_t, x_0, eps [B, C, H, W], t [B], and of which image of the data each row is, picked int64 [B] on the CPU.
        """
        mean = self(x_t, t, picked)
        signal, noise = self._schedule.alpha_bar.sqrt(), (1 - self._schedule.alpha_bar).sqrt()
        return mean, eps + gather(signal / noise, t, x_0) * (x_0 - mean)

    def __call__(self, x_t: Tensor, t: Tensor, picked: Tensor) -> Tensor:
        """E[x_0 | x_t, group of the image picked]: x_t [B, C, H, W], t [B], picked [B] -> [B, C, H, W], in float32."""
        mean = torch.empty_like(x_t, dtype=torch.float32)
        groups = self._group_of[picked]
        alpha_bar = self._schedule.alpha_bar[t].to(torch.float32)[:, None]
        for group in sorted(set(groups.tolist())):
            rows = (groups == group).nonzero()[:, 0].to(x_t.device)
            images = self._origins[self._groups[group]]
            images = (to_model_range(images) if images.dtype == torch.uint8 else images).to(torch.float32).flatten(1)
            a = alpha_bar[rows]
            # -|x_t - alpha x_0|^2 / (2 sigma^2), without what is the same for all x_0
            logits = (a.sqrt() * (x_t[rows].flatten(1) @ images.T) - a / 2 * images.square().sum(1)) / (1 - a)
            mean[rows] = (logits.softmax(1) @ images).view_as(mean[rows])
        return mean
