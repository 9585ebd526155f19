"""`tminus tune`: fits tables of few steps to a checkpoint, and recommends one of them.

Each table is written as soon as it is fitted. An interrupted run resumes with the first missing table.

The recommended table is the smallest one that is as exact as the plain sampler it replaces. Tables are not judged by
the teacher's images, because they are fitted to them. They are judged by a more exact solution: the teacher's sampler
in twice as many steps, from noise that was not used for fitting. A table is good enough if its images are at least as
close to this solution as the plain sampler's images.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tminus.model.catalogue import MAX_GUIDANCE, SAMPLER_FACTS, TEACHERS, Recommended, usual_settings
from tminus.model.checkpoint import Checkpoint, recommend
from tminus.model.guidance import Forward
from tminus.model.machine import torch_threads
from tminus.model.rng import image_noise
from tminus.model.sampler_tables import Table, read_tables, write_table
from tminus.model.samplers import Plan, table_plan
from tminus.model.timesteps import make_timesteps
from tminus.model.training.run import example_pass, faster_of
from tminus.model.tuning.fit import Fit, Fitter, Rows, search_timesteps
from tminus.model.tuning.refine import Refiner

TUNED = "tuned"
FEW = 4  # number of images for timing gradients in each precision
TEACHER_STEPS = 50  # minimum, so that a table can be more exact than the sampler it replaces
STARTS = ("linspace", "trailing", "karras")  # spacings from which the search can start
RIVALS = (("dpmpp_2m", "linspace"), ("dpmpp_2m", "karras"), ("unipc", "linspace"), ("unipc", "karras"))


class TuneError(ValueError):
    """Raised if tables cannot be fitted. The message names the option, its limits and its value."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """The settings for fitting tables."""

    rows: int = 192  # images for fitting, with the classes in turn
    held_out: int = 64  # further images, only for judging
    teacher: str = f"dpmpp_2m:{TEACHER_STEPS}"  # SAMPLER:STEPS
    seed: int = 1_000_000  # for the noise; unlikely to be used for sampling or evaluation
    batch_size: int = 64
    iterations: int = 200  # limit for refining the coefficients

    def __post_init__(self) -> None:
        for name in ("rows", "held_out", "batch_size"):
            if getattr(self, name) < 1:
                raise TuneError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.iterations < 0:
            raise TuneError(f"iterations must be 0 or more, got {self.iterations}")


def check(checkpoint: Checkpoint, steps: Sequence[int], guidances: Sequence[float], config: TuneConfig) -> None:
    """Raise TuneError if this checkpoint cannot be tuned with these steps, guidances and settings."""
    T, labels = checkpoint.noise.num_train_timesteps, checkpoint.labels
    if checkpoint.student is not None:
        raise TuneError(f"{checkpoint.name}: a student has its own tables, and no many-step solution to be tuned to")
    if not steps or not guidances:
        raise TuneError(f"{'steps' if not steps else 'guidance'} must name at least one")
    teacher_steps = len(teacher_plan(checkpoint, config, 1.0))
    for count in steps:
        if not 1 <= count <= T:
            raise TuneError(f"steps must be in 1..{T}, got {count}")
        if count >= teacher_steps:
            raise TuneError(f"steps must be fewer than the teacher's {teacher_steps}, got {count}")
    for guidance in guidances:
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise TuneError(f"guidance must be in 0..{MAX_GUIDANCE:g}, got {guidance:g}")
        if guidance != 1 and labels.null_class is None:
            what = "no classes" if checkpoint.net.class_embedding is None else "no null class"
            raise TuneError(f"guidance must be 1 (off), since {checkpoint.name} has {what}, got {guidance:g}")
    if checkpoint.noise.schedule().alpha_bar[-1] <= 0:
        raise TuneError(f"{checkpoint.name}: its schedule ends without signal (alpha_bar = 0), where nothing is fitted")


def teacher_plan(checkpoint: Checkpoint, config: TuneConfig, guidance: float) -> Plan:
    """Return the teacher's plan. Raises TuneError if config.teacher is invalid."""
    sampler, _, steps = config.teacher.partition(":")
    bound = f"SAMPLER:STEPS, the sampler one of {', '.join(TEACHERS)}"
    if sampler not in TEACHERS or not steps.isdecimal():
        raise TuneError(f"teacher must be {bound}, got {config.teacher!r}")
    try:
        return checkpoint.plan(sampler, int(steps), guidance=guidance)
    except ValueError as error:
        raise TuneError(f"teacher must be {bound}, got {config.teacher!r}: {error}") from None


def default_teacher(checkpoint: Checkpoint) -> str:
    """Return the default teacher as SAMPLER:STEPS.

    The sampler is the recommended one if it is suitable, otherwise the usual one. The number of steps is at least
    TEACHER_STEPS and at most T. If a table is recommended, its own teacher is the default, so that repeating the
    command finds the existing tables.
    """
    own, T = checkpoint.settings, checkpoint.noise.num_train_timesteps
    for table in checkpoint.tables:
        if (table.sampler, table.steps, table.guidance) == (own.sampler, own.steps, own.guidance):
            return str(table.about.get("teacher") or default_teacher(dataclasses.replace(checkpoint, tables=())))
    if own.sampler not in TEACHERS:
        own = usual_settings(T)
    return f"{own.sampler}:{min(max(own.steps, TEACHER_STEPS), T)}"


def tune(
    folder: Path,
    checkpoint: Checkpoint,
    forward: Forward,
    steps: Sequence[int],
    guidances: Sequence[float],
    config: TuneConfig,
    *,
    device: torch.device,
    say: Callable[[str], None],
    threads: int | None = None,
) -> list[Path]:
    """Fit and write a table for each number of steps at each guidance scale. Returns the new files.

    Existing tables for these weights and settings are kept. Then the smallest table that is good enough is recommended
    in tminus.json, unless all tables existed and were judged before. `forward` runs the checkpoint's network. `threads`
    is the number of torch threads for computing gradients; None keeps the current number. Raises TuneError.
    """
    check(checkpoint, steps, guidances, config)
    settings = dataclasses.asdict(config)
    tables = [table for table in checkpoint.tables if table.sampler == TUNED]
    done = {(table.steps, table.guidance): table for table in tables if table.about.get("settings") == settings}
    files: list[Path] = []
    precision = None if config.iterations else "fp32"  # None until it is chosen below
    for guidance in guidances:
        for count in sorted(count for count in set(steps) if (count, guidance) in done):
            say(f"{count} steps at guidance {guidance:g}: tuned already")
        wanted = sorted(count for count in set(steps) if (count, guidance) not in done)
        if not wanted:
            continue
        held_out = config.held_out
        rows = make_rows(checkpoint, config.seed, range(config.rows + held_out), guidance, device)
        fitter = Fitter(checkpoint, forward, rows, guidance, held_out=held_out, batch_size=config.batch_size)
        say(f"guidance {guidance:g}: the teacher, {config.teacher}, makes {config.rows + held_out} images")
        fitter.solve(teacher_plan(checkpoint, config, guidance))
        if precision is None:
            with torch_threads(threads):  # On a CPU without bf16 support, bf16 is 20 times slower.
                few = example_pass(checkpoint.net, (FEW, *checkpoint.row_shape), device)
                precision = faster_of(checkpoint.net, few, device)
            say(f"gradients in {precision}, which is faster here")
        one = _Tuning(folder, checkpoint, fitter, guidance, config, precision, say, threads)
        files += [one.tune(count) for count in wanted]
    if files or not all(done[count, guidance].about.get("judged") for guidance in guidances for count in steps):
        _recommend(folder, checkpoint, forward, config, device, say)
    else:
        say(f"recommended as before: {checkpoint.settings} (these tables were judged already)")
    return files


class Verdict(NamedTuple):
    """The table to recommend, or None to keep the current recommendation, with the reason."""

    recommended: Recommended | None
    why: str


class Trial:
    """Compares tables with the plain sampler that they would replace."""

    def __init__(self, checkpoint: Checkpoint, tables: Iterable[Table]) -> None:
        """Select the tables that have the recommended guidance, and fewer passes than the plain sampler."""
        own = checkpoint.settings
        usual = dataclasses.replace(usual_settings(checkpoint.noise.num_train_timesteps), guidance=own.guidance)
        self.plain = usual if own.sampler == TUNED else own
        self._passes = SAMPLER_FACTS[self.plain.sampler].num_passes(self.plain.steps)
        rivals = [table for table in tables if (table.sampler, table.guidance) == (TUNED, own.guidance)]
        rivals = [table for table in rivals if SAMPLER_FACTS[TUNED].num_passes(table.steps) < self._passes]
        self.tables = sorted(rivals, key=lambda table: table.steps)
        self._checkpoint = checkpoint

    @property
    def hindrance(self) -> str | None:
        """The reason why nothing can be compared, or None."""
        if SAMPLER_FACTS[self.plain.sampler].noise == "always":
            return f"{self.plain} adds fresh noise, so its images are no solution's"
        if not self.tables:
            return f"no table has the guidance of {self.plain}, and fewer than its {self._passes} passes"
        return None

    def run(self, teacher: str, forward: Forward, rows: Rows, batch_size: int) -> Verdict:
        """Judge tables, starting with the fewest steps, until one is good enough.

        `teacher` is SAMPLER:STEPS, with a plain sampler. `forward` runs the checkpoint's network.
        """
        if self.hindrance is not None:
            return Verdict(None, self.hindrance)
        checkpoint, plain = self._checkpoint, self.plain
        noise, (sampler, _, steps) = checkpoint.noise, teacher.partition(":")
        finer = min(noise.num_train_timesteps, 2 * max(plain.steps, int(steps)))

        judge = Fitter(
            checkpoint, forward, rows, plain.guidance, held_out=len(rows.noise), batch_size=batch_size
        )  # used only to measure errors
        judge.solve(checkpoint.plan(sampler, finer, guidance=plain.guidance))

        def error(plan: Plan) -> float:
            return math.sqrt(judge.error(plan))

        plain_error = error(checkpoint.plan(plain.sampler, plain.steps, guidance=plain.guidance))
        figures = f"root mean square error from {finer} steps of {sampler}: {plain_error:.4f} by {plain}"
        for table in self.tables:
            table_error = error(table_plan(noise, noise.schedule(), table, clip=None))
            figures += f", {table_error:.4f} by {table.steps} of {TUNED}"
            if table_error <= plain_error:
                return Verdict(Recommended(TUNED, table.steps, table.guidance), figures)
        return Verdict(None, figures)


def _recommend(
    folder: Path,
    checkpoint: Checkpoint,
    forward: Forward,
    config: TuneConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Judge the folder's tables, and store the recommendation in tminus.json.

    Then mark the tables with these settings as judged, so that repeating the command does not judge them again. A new
    recommendation can change the sampler that tables are compared with, and so the result.
    """
    tables, _ = read_tables(
        folder,
        checkpoint.weights_hash,
        checkpoint.noise.to_dict(),
        num_timesteps=checkpoint.noise.num_train_timesteps,
        null_class=checkpoint.labels.null_class is not None,
        fractional=checkpoint.fractional,
    )
    trial, first = Trial(checkpoint, tables), config.rows + config.held_out  # first row not used for fitting
    rows = make_rows(checkpoint, config.seed, range(first, first + config.held_out), trial.plain.guidance, device)
    recommended, why = trial.run(config.teacher, forward, rows, config.batch_size)
    if recommended is None:
        say(f"recommended as before: {checkpoint.settings} ({why})")
    else:
        recommend(folder, recommended)
        say(f"recommended from now on: {recommended} ({why})")
    for table in tables:
        if table.about.get("settings") == dataclasses.asdict(config):
            judged = dataclasses.replace(table, about={**table.about, "judged": True})
            write_table(folder, judged, checkpoint.weights_hash, checkpoint.noise.to_dict())


def make_rows(checkpoint: Checkpoint, seed: int, indices: range, guidance: float, device: torch.device) -> Rows:
    """Make rows to sample: noise, and classes in turn. Without guidance, the null class counts as a class."""
    labels, null_class = None, checkpoint.labels.null_class
    if checkpoint.net.class_embedding is not None:
        kinds = checkpoint.labels.num_classes + (1 if guidance == 1 and null_class is not None else 0)
        labels = torch.arange(indices.start, indices.stop, device=device) % kinds  # The null class is the last label.
    return Rows(image_noise(seed, indices, 0, checkpoint.row_shape, device), labels)


@dataclass(frozen=True, slots=True)
class _Tuning:
    """Fits tables for one guidance scale to the teacher's trajectory."""

    folder: Path
    checkpoint: Checkpoint
    fitter: Fitter
    guidance: float
    config: TuneConfig
    precision: str  # of the gradients
    say: Callable[[str], None]
    threads: int | None

    def tune(self, steps: int) -> Path:
        name, began_s = f"{steps} steps at guidance {self.guidance:g}", time.monotonic()

        def on_round(number: int, best: Fit) -> None:
            error = f"error {best.held_out:.6f} (fitted {best.fitted:.6f})"
            self.say(f"{name}: timesteps, round {number}, {error}")

        def on_check(iteration: int, distance: float) -> None:
            self.say(f"{name}: coefficients, iteration {iteration}, distance {distance:.6f}")

        fit, tried = search_timesteps(self.fitter, self._best_start(steps), self._settle, on_round)
        fit = dataclasses.replace(fit, passes=())  # to free memory for the gradients
        with torch_threads(self.threads):
            refiner = Refiner(
                self.checkpoint, fit.timesteps, self.guidance, self.fitter.rows, self.fitter.images,
                held_out=self.config.held_out, precision=self.precision,
            )  # fmt: skip
            refined = refiner.run(fit.lines, self.config.iterations, self.config.batch_size // 2 or 1, on_check)

        noise, lines = self.checkpoint.noise, tuple((*line, 0.0) for line in refined.lines)
        table = Table(TUNED, steps, self.guidance, fit.timesteps, lines)
        errors = {TUNED: self.fitter.error(table_plan(noise, self.fitter.schedule, table, clip=None))}
        for sampler, spacing in RIVALS:
            errors[f"{sampler}, {spacing}"] = self.fitter.error(self.checkpoint.plan(sampler, steps, spacing=spacing))
        about = {
            "teacher": self.config.teacher,
            "settings": dataclasses.asdict(self.config),
            "held_out_error": errors,
            "distance": {"fitted": refined.fitted, "refined": refined.distance},
            "timesteps_tried": tried,
            "iterations": refined.iterations,
            "precision": self.precision,
            "seconds": round(time.monotonic() - began_s),
        }
        table = dataclasses.replace(table, about=about)
        written = write_table(self.folder, table, self.checkpoint.weights_hash, noise.to_dict())
        untuned = min((value, key) for key, value in errors.items() if key != TUNED)
        self.say(f"{name}: error {errors[TUNED]:.6f}; that of {untuned[1]} is {untuned[0]:.6f}; {written}")
        return written

    def _settle(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Round timesteps if the network only accepts whole ones. They remain distinct and at least 0."""
        if self.checkpoint.fractional:
            return tuple(timesteps)
        whole: list[float] = []
        for k, t in enumerate(timesteps):
            whole.append(max(min(round(t), whole[-1] - 1) if whole else round(t), len(timesteps) - 1 - k))
        return tuple(whole)

    def _best_start(self, steps: int) -> Fit:
        log_sigmas, fractional = self.fitter.schedule.log_sigmas, self.checkpoint.fractional

        def fit(spacing: str) -> Fit:
            sampler = "euler" if spacing == "karras" else "dpmpp_2m"
            t = make_timesteps(
                sampler,
                spacing,
                steps,
                len(log_sigmas),
                0,
                log_sigmas,
                fractional=fractional,
                continuous=self.checkpoint.noise.is_continuous,
            )
            return self.fitter.fit(self._settle(t))

        return min(map(fit, STARTS), key=lambda each: each.held_out)  # A list would keep all passes in memory.
