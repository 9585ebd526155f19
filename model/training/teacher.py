"""The teacher of `distill`: its trajectories, and the reference for the student's images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tminus.model.catalogue import TEACHERS
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.evaluation.distances import Gaussian, fit_gaussian
from tminus.model.guidance import Forward
from tminus.model.samplers import Plan, solve
from tminus.model.training.data import Examples, ImageSet
from tminus.model.training.network_features import NetworkFeatures
from tminus.model.training.run import TrainError

REFERENCE = -2  # step of `step_seed` for the reference; the sets of trajectories use -3, -4, …
REFERENCE_ROWS, REFERENCE_IMAGES = 2048, 10_000  # limits for the teacher's images and for `data`


@dataclass(frozen=True, slots=True)
class Trajectories:
    """P points of each trajectory and x_0, together [P + 1, N, C, H, W]; labels [N] or None."""

    points: Tensor
    labels: Tensor | None


class Teacher:
    """A checkpoint that generates trajectories with a given guidance and solver."""

    def __init__(self, folder: Path, sampler: str, steps: int, guidance: float) -> None:
        """Load the checkpoint and compile the solver.

        Raises CheckpointError, ValueError, and TrainError for a checkpoint or solver that cannot be distilled.
        """
        self.checkpoint = load_checkpoint(folder)
        self.guidance = guidance
        self.plan = _solver(folder, self.checkpoint, sampler, steps, guidance)
        self.net = self.checkpoint.net.requires_grad_(False)
        self.prepare(torch.device("cpu"), nullcontext(), rows_at_once=64, compile_net=False)

    def prepare(
        self, device: torch.device, autocast: AbstractContextManager[object], *, rows_at_once: int, compile_net: bool
    ) -> None:
        """Move the network to the device, and set how it is run."""
        self.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward: Forward = torch.compile(self.net) if compile_net else self.net
        self._device, self._autocast, self._rows_at_once = device, autocast, rows_at_once
        schedule = self.checkpoint.noise.schedule().to(device)
        self._features = NetworkFeatures(self.net, schedule, self.net)

    def check(self, data: ImageSet) -> None:
        """Raise TrainError if the images do not have the teacher's shape and number of classes."""
        shape = self.checkpoint.image_shape
        if tuple(data.images.shape[1:]) != shape:
            raise TrainError(
                f"{data.name}: has images of {tuple(data.images.shape[1:])}, and the teacher makes {shape}"
            )
        classes = self.checkpoint.labels.num_classes
        if self.net.class_embedding is not None and len(data.class_names) != classes:
            raise TrainError(f"{data.name}: has {len(data.class_names)} classes, and the teacher {classes}")

    def solve(
        self, seed: int, rows: int, class_dropout: float, points: Sequence[int], stop: Callable[[], bool]
    ) -> Trajectories | None:
        """Generate trajectories from noise, with the classes in turn. Keeps x at the given `points`, and x_0.

        Returns None if stop() becomes true.
        """
        generator = torch.Generator().manual_seed(seed)
        checkpoint = self.checkpoint
        x_T = torch.randn(rows, *checkpoint.row_shape, generator=generator).to(self._device)
        labels = None
        if self.net.class_embedding is not None:
            labels = self._drop(torch.arange(rows) % checkpoint.labels.num_classes, class_dropout, generator)
        parts = []
        for part in self._parts(rows):
            if stop():
                return None
            x = x_T[part].contiguous(memory_format=torch.channels_last)
            of_part = labels[part] if labels is not None else None
            with self._autocast:
                solved = solve(self._forward, self.plan, x, of_part, checkpoint.labels.null_class, self.guidance)
            parts.append(solved[[*points, -1]])
        return Trajectories(torch.cat(parts, dim=1), labels)

    def reference(
        self, data: ImageSet | None, seed: int, class_dropout: float, stop: Callable[[], bool]
    ) -> Gaussian | None:
        """Fit a Gaussian to the `numbers` of `data` or of the teacher's images; None if stop() becomes true."""
        generator = torch.Generator().manual_seed(seed)
        if data is None:
            solved = self.solve(seed, REFERENCE_ROWS, class_dropout, (), stop)
            if solved is None:
                return None
            examples = Examples(solved.points[-1], solved.labels)
        else:
            count = min(len(data), REFERENCE_IMAGES)
            examples = Examples.some_of(data, count, self.checkpoint.autoencoder, self._device)
            labels = examples.class_labels if self.net.class_embedding is not None else None
            labels = self._drop(labels, class_dropout, generator) if labels is not None else None
            examples = Examples(examples.x_0, labels)
        numbers = []
        for part in self._parts(len(examples.x_0)):
            if stop():
                return None
            images = examples.rows(part, self._device)
            eps = torch.randn(images.shape, generator=generator).to(images)
            with torch.no_grad():
                of_part = examples.class_labels[part] if examples.class_labels is not None else None
                numbers.append(self.numbers(images, of_part, eps))
        return fit_gaussian(torch.cat(numbers))

    def numbers(self, images: Tensor, labels: Tensor | None, eps: Tensor) -> Tensor:
        with self._autocast:
            return self._features.numbers(images, labels, eps)

    def num_numbers(self) -> int:
        """Return the length of one image's `numbers`."""
        x = torch.zeros(1, *self.checkpoint.row_shape, device=self._device)
        labels = torch.zeros(1, dtype=torch.long, device=self._device) if self.net.class_embedding is not None else None
        with torch.no_grad():
            return self.numbers(x, labels, x).shape[1]

    def _drop(self, labels: Tensor, class_dropout: float, generator: torch.Generator) -> Tensor:
        null_class = self.checkpoint.labels.null_class
        if null_class is not None:
            dropped = torch.rand(len(labels), generator=generator) < class_dropout
            labels = torch.where(dropped, null_class, labels)
        return labels.to(self._device)

    def _parts(self, rows: int) -> list[slice]:
        return [slice(start, start + self._rows_at_once) for start in range(0, rows, self._rows_at_once)]


def _solver(folder: Path, teacher: Checkpoint, sampler: str, steps: int, guidance: float) -> Plan:
    """Return the teacher's plan. Raises TrainError if this teacher or solver cannot be distilled."""
    if teacher.student is not None:
        raise TrainError(f"{folder}: is a student itself; distill its teacher")
    if teacher.noise.variance_type == "learned_range":
        raise TrainError(f"{folder}: has variance_type learned_range, and only fixed variances are distilled")
    if teacher.noise.is_continuous:
        predicts = f"prediction_type {teacher.noise.prediction_type}"
        raise TrainError(f"{folder}: has {predicts}, and only networks of epsilon, sample or v are distilled")
    if guidance != 1 and teacher.labels.null_class is None:
        raise TrainError(f"guidance must be 1 (off) for a checkpoint without a null class, got {guidance:g}")
    if sampler not in TEACHERS:
        raise TrainError(f"teacher_sampler must be among {', '.join(TEACHERS)}, got {sampler!r}")
    limit = teacher.noise.num_train_timesteps
    if steps > limit:
        raise TrainError(f"teacher_steps must be 1..{limit}, got {steps}")
    return teacher.plan(sampler, steps)
