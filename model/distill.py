"""Distillation: a student of few passes learns where the trajectories of its teacher end, guidance folded in.

Consistency tuning (Geng et al. 2024) along the teacher's own solutions. A batch has points x_t of trajectories; the
target is the student's own prediction some points further on, and at first, where the stage looks all the way, the end
of the trajectory itself. As in `train`, what is random in step k is seeded by (seed, k).
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tminus.model.catalogue import PLAIN_SOLVERS
from tminus.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.ema import Ema
from tminus.model.guidance import Forward
from tminus.model.latent.folder import check_place, with_autoencoder
from tminus.model.networks.registry import build
from tminus.model.recommended import MAX_GUIDANCE, Recommended
from tminus.model.run import (
    Progress,
    RunConfig,
    RunState,
    TrainError,
    averaged,
    faster_precision,
    interruptible,
    step_seed,
)
from tminus.model.run_file import begun_in
from tminus.model.samplers import Plan, solve
from tminus.model.student import (
    MAX_STEPS,
    SAMPLER,
    best_points,
    consistency_plan,
    consistency_table,
    even_points,
    image_features,
    predict_x0,
    pseudo_huber,
    student_noise,
)
from tminus.model.tables import table_file, write_table
from tminus.model.weights import hash_weights

log = logging.getLogger(__name__)

TRIAL = -2  # the round whose trajectories choose the timesteps; others count down from -3
TRIAL_ROWS = 512


@dataclass(frozen=True, slots=True)
class DistillConfig(RunConfig):
    """The settings of a run of `distill`."""

    class_dropout: float = 0.1  # how often the null class replaces a label; it is not guided
    guidance: float = 1.0  # the teacher's, which the student has in its weights
    student_steps: tuple[int, ...] = (1, 2, 3, 4)  # the numbers of steps that it gets tables for
    teacher_sampler: str = "dpmpp_2m"
    teacher_steps: int = 20
    trajectories: int = 128  # that the teacher solves at a time
    uses: int = 1  # of each point of them, at the mean
    stage_steps: int = 1500  # after which the target is half as far along the trajectory
    first_share: float = 0.2  # of a batch: pure noise, from which all images begin

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for field in ("class_dropout", "first_share"):
            self.require_share(field)
        self.require(0 <= self.guidance <= MAX_GUIDANCE, "guidance", f"in 0..{MAX_GUIDANCE:g}")
        for field in ("teacher_steps", "trajectories", "uses", "stage_steps"):
            self.require(getattr(self, field) >= 1, field, "1 or more")
        steps = self.student_steps
        bound = f"different numbers in 1..{MAX_STEPS}"
        self.require(
            0 < len(set(steps)) == len(steps) and all(1 <= n <= MAX_STEPS for n in steps), "student_steps", bound
        )
        self.require(max(steps) <= self.teacher_steps, "teacher_steps", f"{max(steps)} or more, the student's steps")

    def look_ahead(self, step: int) -> int:
        """How many points further the target is: all of them at first, one in the end."""
        return max(1, self.teacher_steps >> step // self.stage_steps)

    @property
    def round_steps(self) -> int:
        """Optimiser steps between two sets of trajectories."""
        return max(1, self.uses * self.trajectories * self.teacher_steps // self.batch_size)


class Round(NamedTuple):
    """Trajectories of the teacher: points [P + 1, N, C, H, W], the last x_0, and labels [N] or None."""

    points: Tensor
    labels: Tensor | None


def distill(
    folder: Path,
    teacher_folder: Path,
    config: DistillConfig,
    *,
    device: torch.device,
    on_sheet: Callable[[Denoiser, Plan, int], None] | None = None,
) -> bool:
    """Train a student in `folder`, resuming from its state if there is one. True when done, False if interrupted.

    It needs no data: all trajectories begin in noise. SIGINT or SIGTERM finishes the step, saves and returns. Raises
    TrainError, CheckpointError, and ValueError for a sampler that is not possible.
    """
    teacher = load_checkpoint(teacher_folder)
    if folder.resolve() == teacher_folder.resolve():
        raise TrainError(f"{folder}: is the teacher's folder; choose another for the student")
    check_place(folder, teacher.autoencoder)  # now, and not at the first save
    solver = _solver(teacher_folder, teacher, config)
    unet, noise, labels = teacher.net.config, student_noise(teacher.noise), teacher.labels

    # The state begins with the teacher's weights, though v is to come out of them instead of eps.
    torch.manual_seed(step_seed(config.seed, -1))
    net = build(unet)
    net.load_state_dict(teacher.net.state_dict())
    net = net.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    run = RunState(net, Ema(net, config.ema_decay), optimizer, str(teacher_folder))
    identity: dict[str, Any] = {"teacher": teacher.weights_hash}
    identity |= {f"noise {key}": value for key, value in noise.to_dict().items()}
    begun = begun_in(folder)
    if begun:
        config = run.resume(folder, "distill", config, identity)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    # The plan has a line for each point of a trajectory: what the student makes of its output there.
    timesteps = solver.timesteps.tolist()
    plan = consistency_plan(noise, timesteps)
    bound = float(plan.lines[0, 6])
    if config.precision == "auto":  # chosen once: a resumed run must continue in the same one
        shape = (config.batch_size, *teacher.row_shape)
        config = config.with_precision(faster_precision(net, shape, device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    teacher_net = teacher.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward: Forward = torch.compile(net) if config.compile else net
    teacher_forward: Forward = torch.compile(teacher_net) if config.compile else teacher_net
    log.info("%s: step %d of %d, %s, %s", folder, run.step, config.steps, device, config.precision)

    def new_round(number: int, rows: int, stop: Callable[[], bool]) -> Round | None:
        generator = torch.Generator().manual_seed(step_seed(config.seed, number))
        x_T = torch.randn(rows, *teacher.row_shape, generator=generator).to(device)
        classes = None
        if unet.num_class_embeds is not None:
            classes = torch.arange(rows) % labels.num_classes
            if labels.null_class is not None:
                dropped = torch.rand(rows, generator=generator) < config.class_dropout
                classes = torch.where(dropped, labels.null_class, classes)
            classes = classes.to(device)
        parts = []
        for start in range(0, rows, config.batch_size):
            if stop():
                return None
            part = slice(start, start + config.batch_size)
            of_part = classes[part] if classes is not None else None
            x = x_T[part].contiguous(memory_format=torch.channels_last)
            with autocast:
                parts.append(solve(teacher_forward, solver, x, of_part, labels.null_class, config.guidance))
        return Round(torch.cat(parts, dim=1), classes)

    def predict(at: Round, k: Tensor, row: Tensor) -> Tensor:
        x_t = at.points[k, row].contiguous(memory_format=torch.channels_last)
        with autocast:
            out = forward(x_t, plan.timesteps.to(x_t)[k], at.labels[row] if at.labels is not None else None)
        return predict_x0(plan, k, x_t, out)

    def save(points: dict[int, list[int]]) -> None:
        student = {"teacher": teacher.name, "teacher_hash": teacher.weights_hash, "guidance": config.guidance}
        student |= {"steps": sorted(config.student_steps)}
        provenance = {
            "trained_by": "tminus distill",
            "teacher": run.origin,
            "step": run.step,
            "images_seen": run.step * config.batch_size,
            "config": dataclasses.asdict(config),
        }
        recommended = Recommended(SAMPLER, 2 if 2 in config.student_steps else min(config.student_steps))
        save_checkpoint(
            folder, run.ema.shadow, unet, noise, labels, provenance, recommended, student, teacher.autoencoder
        )
        weights_hash = with_autoencoder(hash_weights(run.ema.shadow), teacher.autoencoder)
        for steps in config.student_steps:
            table = consistency_table(noise, [timesteps[k] for k in points[steps]], student)
            write_table(folder, table, weights_hash, noise.to_dict())
        for old in set(range(1, MAX_STEPS + 1)) - set(config.student_steps):  # of a run with more --student-steps
            table_file(folder, SAMPLER, old, 1.0).unlink(missing_ok=True)
        run.save(folder, "distill", config, identity)

    evenly = {steps: even_points(len(solver), steps) for steps in config.student_steps}
    sheet_plan = consistency_plan(noise, [timesteps[k] for k in evenly[max(evenly)]])
    trajectories: Round | None = None
    began_at = run.step
    with Progress(config, run.step) as progress, interruptible() as interrupted:
        while run.step < config.steps and not interrupted():
            started = time.perf_counter()

            # The teacher solves trajectories from time to time.
            if trajectories is None or run.step % config.round_steps == 0:
                trajectories = new_round(-3 - run.step // config.round_steps, config.trajectories, interrupted)
                if trajectories is None:
                    break

            # Points k of some of them, a part of these at pure noise, all a function of (seed, step).
            torch.manual_seed(step_seed(config.seed, run.step))
            row = torch.randint(config.trajectories, (config.batch_size,)).to(device)
            k = torch.randint(len(solver), (config.batch_size,))
            k = torch.where(torch.rand(config.batch_size) < config.first_share, 0, k).to(device)

            # The target: the trajectory's end, or what the student says some points further on.
            ahead, target = k + config.look_ahead(run.step), trajectories.points[-1, row]
            if config.look_ahead(run.step) < len(solver):
                with torch.no_grad():
                    further = predict(trajectories, ahead.clamp(max=len(solver) - 1), row).clamp(-bound, bound)
                target = torch.where((ahead < len(solver)).reshape(-1, 1, 1, 1), further, target)

            # One descent step.
            loss = pseudo_huber(predict(trajectories, k, row), target)
            grad_norm = run.descend(loss, config)

            # Progress, saves and sheets.
            progress.show(run.step, loss, grad_norm, time.perf_counter() - started, last=interrupted())
            if run.step % config.save_every == 0 and run.step < config.steps:
                save(evenly)
            if on_sheet is not None and (run.step % config.sheet_every == 0 or run.step == config.steps):
                on_sheet(averaged(unet, run.ema), sheet_plan, run.step)
        if run.step > began_at or not begun:  # else the timesteps that were chosen would be lost until they are again
            save(evenly)

    if run.step < config.steps:
        return False

    # The timesteps for each number of steps, by trial on trajectories that were not trained on.
    log.info("%s: choosing timesteps", folder)
    trial = new_round(TRIAL, TRIAL_ROWS, lambda: False)
    assert trial is not None
    student = averaged(unet, run.ema).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = image_features(teacher_net, labels.null_class)
    seed = step_seed(config.seed, TRIAL)
    with autocast:
        points = best_points(student, plan, trial.points, trial.labels, features, seed, max(config.student_steps))
    save(points)
    return True


def _solver(folder: Path, teacher: Checkpoint, config: DistillConfig) -> Plan:
    """The plan by which the teacher solves. Raises TrainError for a teacher that has no such student."""
    if teacher.student is not None:
        raise TrainError(f"{folder}: is a student itself; distill its teacher")
    if teacher.noise.variance_type == "learned_range":
        raise TrainError(f"{folder}: has variance_type learned_range, and only fixed variances are distilled")
    if config.guidance != 1 and teacher.labels.null_class is None:
        raise TrainError(f"guidance must be 1 (off) for a checkpoint without a null class, got {config.guidance:g}")
    sampler, steps = config.teacher_sampler, config.teacher_steps
    if sampler not in PLAIN_SOLVERS:
        raise TrainError(f"teacher_sampler must be among {', '.join(PLAIN_SOLVERS)}, got {sampler!r}")
    limit = teacher.noise.num_train_timesteps
    if steps > limit:
        raise TrainError(f"teacher_steps must be 1..{limit}, got {steps}")
    return teacher.plan(sampler, steps)
