"""The classes of images and samples. Those of a checkpoint and of a data set are matched by name, not by number."""

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.training.data import ImageSet


def class_map(checkpoint: Checkpoint, class_names: tuple[str, ...]) -> Tensor | None:
    """Map each class of the checkpoint to its number in `class_names`, int64 [K]; None where the names differ."""
    names = checkpoint.labels.class_names
    if not names or sorted(names) != sorted(class_names):
        return None
    return torch.tensor([class_names.index(name) for name in names])


def sample_classes(checkpoint: Checkpoint, num_samples: int) -> Tensor | None:
    """Give each sample a class in turn, int64 [num_samples]; None for an unconditional checkpoint."""
    if checkpoint.net.class_embedding is None:
        return None
    return torch.arange(num_samples) % checkpoint.labels.num_classes


def image_classes(checkpoint: Checkpoint, data: ImageSet) -> Tensor | None:
    """The checkpoint's class of each real image, int64 [N]; its null class where names do not match.

    None for an unconditional checkpoint. Raises ValueError where names do not match and there is no null class.
    """
    if checkpoint.net.class_embedding is None:
        return None
    to_data = class_map(checkpoint, data.class_names)
    if data.labels is not None and to_data is not None:
        return to_data.argsort()[data.labels]
    if checkpoint.labels.null_class is None:
        raise ValueError("the checkpoint needs a class, and these images have none that it knows")
    return torch.full((len(data),), checkpoint.labels.null_class)


def random_picks(data: ImageSet, num_images: int, seed: int) -> Tensor:
    """Pick images at random, as many of a class as chance gives: int64 [num_images], or fewer if there are fewer."""
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed % 2**63))[:num_images]


def balanced_picks(data: ImageSet, num_images: int, seed: int) -> Tensor:
    """Pick images at random, classes in turn as among samples: int64 [num_images], or fewer if there are fewer."""
    order = random_picks(data, len(data), seed)
    if data.labels is not None:
        labels = data.labels[order]
        turn = torch.zeros_like(labels)
        for k in range(len(data.class_names)):
            turn[labels == k] = torch.arange(int((labels == k).sum()))
        order = order[(turn * len(data.class_names) + labels).argsort()]
    return order[:num_images]


def class_weights(labels: Tensor, num_classes: int) -> Tensor | None:
    """Weights by which each class counts as much as any other, as among samples: int64 [N] to float64 [N].

    None where images count as they are: classes in turn differ by one image at most, and so do these.
    """
    counts = labels.bincount(minlength=num_classes)
    return None if counts.max() - counts.min() <= 1 else (1 / counts.double())[labels]
