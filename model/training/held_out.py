"""Measures the loss on held-out images, and on the same number of training images.

While both losses fall, training helps. If the held-out loss no longer falls, more steps are useless. If it rises while
the training loss falls, the network memorises its training images.
"""

import csv
import io
import logging
from pathlib import Path

import torch
from torch import Tensor

from tminus.model.files import write_text
from tminus.model.guidance import Forward
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.loss import l_simple, training_target
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.parametrization import as_ours
from tminus.model.rng import row_noise, split_seed
from tminus.model.training.data import Examples, ImageSet, evenly

log = logging.getLogger(__name__)

LOSSES_FILE = "losses.csv"
HEAD = "step,training,held_out,held_out_images"
MEASURED = 2000  # number of images from each set, at most
BATCH = 64  # largest batch size
SEED = 0


def unlike(held_out: ImageSet, data: ImageSet) -> str | None:
    """Describe how two data sets differ in image shape or classes. Returns None if they do not."""
    for what, of_held_out, of_data in (
        ("images of", held_out.images.shape[1:], data.images.shape[1:]),
        ("the classes", held_out.class_names, data.class_names),
    ):
        if of_held_out != of_data:
            return f"{held_out.name}: has {what} {tuple(of_held_out)}, and {data.name} {tuple(of_data)}"
    return None


class HeldOutLoss:
    """Measures the averaged network's loss on held-out images, and on as many training images."""

    def __init__(
        self,
        examples: Examples,
        held_out: ImageSet,
        autoencoder: Autoencoder | None,
        noise: NoiseConfig,
        schedule: NoiseSchedule,
        weights: Tensor | None,
    ) -> None:
        """`examples` are the training data, on the schedule's device. `weights` [T] are those of `mean_loss`."""
        self._count = min(len(examples.x_0), len(held_out), MEASURED)  # Equal counts give both sets the same timesteps.
        others = Examples.some_of(held_out, self._count, autoencoder, schedule.betas.device)
        self._examples, self._name = (examples, others), f"{held_out.name} ({len(held_out)})"
        self._loss = noise, schedule, weights

    def note(self, folder: Path, step: int, average: Forward, batch_size: int) -> None:
        """Measure both losses and add them to losses.csv. The run's `batch_size` is known to fit in memory."""
        size = min(batch_size, BATCH)
        ours, theirs = (mean_loss(average, each, self._count, *self._loss, batch_size=size) for each in self._examples)
        note_losses(folder, step, ours, theirs, self._name)
        log.info("step %d: loss of the average %.5f on training images, %.5f held out", step, ours, theirs)


@torch.no_grad()
def mean_loss(
    net: Forward,
    examples: Examples,
    count: int,
    noise: NoiseConfig,
    schedule: NoiseSchedule,
    weights: Tensor | None = None,
    *,
    batch_size: int = BATCH,
) -> float:
    """Return the mean L_simple of `count` evenly spaced examples, each at one timestep.

    weights [T]: the weight of the loss at each timestep; None weights all timesteps equally.

    The timesteps are spread evenly over 0..T-1. Calls with the same `count` use the same timesteps and eps, so their
    losses differ only because of the network and the images. The network must be on the schedule's device.
    """
    device, net = schedule.betas.device, as_ours(net, noise, schedule)
    picked = evenly(len(examples.x_0), count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).to(device)
    timesteps = order * schedule.num_timesteps // count
    seed_words = torch.tensor(split_seed(SEED), device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, count, batch_size):
        of_batch = picked[first : first + batch_size]
        x_0 = examples.rows(of_batch, device)
        index = torch.arange(first, first + len(of_batch), device=device)
        t = timesteps[index]
        eps = row_noise(seed_words.expand(len(index), 2), index, torch.zeros_like(index), x_0.shape[1:])
        labels = examples.class_labels[of_batch].to(device) if examples.class_labels is not None else None
        out = net(schedule.q_sample(x_0, t, eps), t, labels)
        target = training_target(noise, schedule, x_0, t, eps)
        loss = l_simple(out, target, weights[t] if weights is not None else None)
        total += loss.double() * len(index)
    return float(total / count)


def note_losses(folder: Path, step: int, training: float, held_out: float, of: str) -> None:
    """Add a line to the run's losses.csv. `of` names the held-out images, which may change during a run.

    Removes lines for this step and later ones, which an interrupted run may have left.
    """
    file = folder / LOSSES_FILE
    known = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
    numbered = [(line.partition(",")[0], line) for line in known]
    earlier = [line for number, line in numbered if number.isdecimal() and int(number) < step]
    last = io.StringIO()
    csv.writer(last, lineterminator="\n").writerow([step, f"{training:.6f}", f"{held_out:.6f}", " ".join(of.split())])
    write_text(file, "\n".join([HEAD, *earlier, last.getvalue()]))
