"""Distillation: a student learns to predict, in a few passes, where its teacher's trajectories end.

The trajectories are guided, so the student needs no guidance of its own. The loss has two parts. The first is the
distance of the student's image from the end of the teacher's trajectory. The second is the distance between the
distribution of the student's images and that of real images, or of the teacher's images. With the first alone, images
are too soft; with the second alone, they do not depend on x_T. As in train.py, all random numbers of step k are seeded
by (seed, k).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import save_checkpoint
from tminus.model.consistency import SAMPLER, consistency_table
from tminus.model.denoiser import Denoiser
from tminus.model.guidance import Forward
from tminus.model.latent.autoencoder import check_place, with_autoencoder
from tminus.model.networks import build
from tminus.model.noise import NoiseConfig
from tminus.model.pixels import RGBA
from tminus.model.sampler_tables import write_table
from tminus.model.samplers import Plan, table_plan
from tminus.model.training.config import DistillConfig
from tminus.model.training.data import ImageSet
from tminus.model.training.network_features import FrechetLoss
from tminus.model.training.run import Run, TrainError, averaged, example_pass, step_seed
from tminus.model.training.targets import product_of
from tminus.model.training.teacher import REFERENCE, Teacher, Trajectories
from tminus.model.weights import hash_weights

log = logging.getLogger(__name__)

LEVELS = (0.3, 0.05, 0.7)  # alpha_bar of the points that are added for two, three and four steps
HUBER = 0.03  # c in `pseudo_huber`, in units of x0


def student_noise(noise: NoiseConfig) -> NoiseConfig:
    """Return the noise config of the student, which predicts v.

    At high noise, an error in eps becomes a much larger error in x_0. An error in v does not grow.
    """
    return replace(noise, prediction_type="v_prediction", default_sampler="ddpm")


def predict_x0(plan: Plan, k: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Return x0 = p x + q out at points k [B] of a plan, for x and out [B, C, H, W].

    x0 is not clipped, because clipping would stop gradients.
    """
    p, q = plan.lines[:, :2].to(x)[k].reshape(-1, 2, 1, 1, 1).unbind(1)
    return p * x + q * out.to(x.dtype)


def pseudo_huber(x0: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of sqrt(d^2 + c^2) - c, where d is the RMS of x0 - target.

    Source: Song & Dhariwal 2023. Large errors count linearly instead of squared, because the large errors at high noise
    teach little.
    """
    squares = (x0 - target).square().flatten(1).mean(1)
    return ((squares + HUBER**2).sqrt() - HUBER).mean()


def consistency_plan(noise: NoiseConfig, timesteps: Sequence[float]) -> Plan:
    """Return the plan of consistency sampling with these timesteps."""
    return table_plan(noise, noise.schedule(), consistency_table(noise, timesteps), clip=None)


def student_points(alpha_bar: Tensor, steps: int) -> list[int]:
    """Return the points of the teacher's plan that a student visits in `steps` steps, in order.

    `alpha_bar` [P] belongs to the teacher's plan. With more steps, the student visits the same points and additional
    ones, so it has few points to learn.
    """
    chosen = [0]
    for level in LEVELS[: steps - 1]:
        free = [k for k in range(len(alpha_bar)) if k not in chosen]
        chosen.append(min(free, key=lambda k: abs(float(alpha_bar[k]) - level)))
    return sorted(chosen)


def distill(
    folder: Path,
    teacher_folder: Path,
    config: DistillConfig,
    *,
    device: torch.device,
    data: ImageSet | None = None,
    on_sheet: Callable[[Denoiser, Plan, int], None] | None = None,
) -> bool:
    """Train a student in `folder`, or resume the run there. Returns whether all steps are done.

    All trajectories start from noise. The second part of the loss compares the student's images with `data`, or with
    the teacher's images if there is no `data`. On SIGTERM or SIGINT, finishes the current step and saves. After SIGINT,
    also raises KeyboardInterrupt if steps are left. Raises TrainError, CheckpointError, and ValueError for an
    impossible sampler.
    """
    teacher = Teacher(teacher_folder, config.teacher_sampler, config.teacher_steps, config.guidance)
    of_teacher = teacher.checkpoint
    if folder.resolve() == teacher_folder.resolve():
        raise TrainError(f"{folder}: is the teacher's folder; choose another for the student")
    check_place(folder, of_teacher.autoencoder)  # Fail now, not at the first save.
    if data is not None:
        teacher.check(data)
    unet, noise, labels = of_teacher.net.config, student_noise(of_teacher.noise), of_teacher.labels

    # The plan has one line for each point that the student visits. The line turns the student's output into x0.
    levels = teacher.plan.alpha_bar
    points = student_points(levels, max(config.student_steps))
    timesteps = teacher.plan.timesteps.tolist()
    plan = consistency_plan(noise, [timesteps[k] for k in points])
    bound = float(plan.lines[0, 6])

    run = Run(folder, "distill", str(teacher_folder))
    # The student starts from the teacher's weights, even if the teacher does not predict v.
    torch.manual_seed(step_seed(config.seed, -1))
    net = build(unet)
    net.load_state_dict(of_teacher.net.state_dict())
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    frechet = FrechetLoss(len(points), teacher.num_numbers()).to(device)
    identity: dict[str, Any] = {"teacher": of_teacher.weights_hash}
    identity |= {f"noise {key}": value for key, value in noise.to_dict().items()}
    identity |= {"data": f"{data.name}, {len(data)} images" if data is not None else None}
    forwards = example_pass(net, (config.batch_size, *of_teacher.row_shape), device)
    config = run.begin(net, optimizer, config, identity, device, forwards, remembered=frechet)
    forward: Forward = torch.compile(net) if config.compile else net
    teacher.prepare(device, run.autocast, rows_at_once=config.batch_size, compile_net=config.compile)

    def predict(k: Tensor, x_t: Tensor, classes: Tensor | None) -> Tensor:
        with run.autocast:
            out = forward(x_t.contiguous(memory_format=torch.channels_last), plan.timesteps.to(x_t)[k], classes)
        return predict_x0(plan, k, x_t, out)

    def save() -> None:
        shadow, folded = run.ema.shadow, product_of(config.guidance, of_teacher)
        student = {"teacher": of_teacher.name, "teacher_hash": of_teacher.weights_hash, "guidance": folded}
        student |= {"steps": sorted(config.student_steps)}
        provenance = run.provenance(config, teacher=run.origin, data=data.name if data is not None else None)
        recommended = Recommended(SAMPLER, 2 if 2 in config.student_steps else min(config.student_steps))
        save_checkpoint(
            folder,
            shadow,
            unet,
            noise,
            labels,
            provenance,
            recommended,
            student,
            of_teacher.autoencoder,
            folded,
            alpha=of_teacher.alpha if of_teacher.image_shape[0] == RGBA else None,
        )
        weights_hash = with_autoencoder(hash_weights(shadow), of_teacher.autoencoder)
        for steps in config.student_steps:
            visited = [timesteps[k] for k in student_points(levels, steps)]
            write_table(folder, consistency_table(noise, visited, student), weights_hash, noise.to_dict())
        if config.frechet_weight:
            apart = ", ".join(f"{each:.4f}" for each in frechet.distance.tolist())
            log.info("step %d: distance from the reference of images from each timestep: %s", run.step, apart)

    def look() -> None:
        if on_sheet is not None:
            on_sheet(averaged(lambda: build(unet), run.ema), plan, run.step)

    num_first, num_other = config.num_first, config.batch_size - config.num_first
    trajectories: Trajectories | None = None

    def loss_of(step: int) -> Tensor | None:
        if step == 0 and config.frechet_weight:
            log.info("%s: reading %s", folder, data.name if data is not None else "the teacher's images")
            seed = step_seed(config.seed, REFERENCE)
            reference = teacher.reference(data, seed, config.class_dropout, run.interrupted)
            if reference is None:
                return None
            frechet.set_reference(reference)

        # Every `round_steps` steps, the teacher solves new trajectories.
        nonlocal trajectories
        if trajectories is None or step % config.round_steps == 0:
            seed = step_seed(config.seed, REFERENCE - 1 - step // config.round_steps)
            trajectories = teacher.solve(seed, config.trajectories, config.class_dropout, points, run.interrupted)
            if trajectories is None:
                return None

        # Pick trajectories, and a point k on each of them. The first num_first rows are at pure noise.
        row = torch.randint(config.trajectories, (config.batch_size,)).to(device)
        later = [torch.randint(1, len(points), (n,)) for n in (num_other, num_first)] if len(points) > 1 else []
        k = torch.cat([torch.zeros(num_first, dtype=torch.long), *later[:1]]).to(device)
        classes = trajectories.labels[row] if trajectories.labels is not None else None

        # First part of the loss: the distance from the ends of the trajectories.
        x0 = predict(k, trajectories.points[k, row], classes)
        loss = pseudo_huber(x0, trajectories.points[-1, row])

        # Second part of the loss: compare images made in one step, and in two steps like the sampler's, with the
        # reference.
        if config.frechet_weight:
            images, kind = x0[:num_first].clamp(-bound, bound), k[:num_first]
            of_images = classes[:num_first] if classes is not None else None
            if later:
                further = later[1].to(device)
                alpha_bar = plan.alpha_bar.to(x0)[further].reshape(-1, 1, 1, 1)
                z = torch.randn(images.shape).to(x0)
                x_t = alpha_bar.sqrt() * images.detach() + (1 - alpha_bar).sqrt() * z
                images = torch.cat([images, predict(further, x_t, of_images).clamp(-bound, bound)])
                kind = torch.cat([kind, further])
                of_images = torch.cat([of_images, of_images]) if of_images is not None else None
            eps = torch.randn(images.shape).to(images)
            numbers = teacher.numbers(images, of_images, eps)
            loss = loss + config.frechet_weight * frechet(numbers, kind).mean()
        return loss

    return run.descend(config, loss_of, save, look)
