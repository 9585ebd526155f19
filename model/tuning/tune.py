"""`tminus tune`: fit tables of few steps to a checkpoint, one after the other, each written as soon as it is done.

The target of a table is a function of the settings, so a run that was killed goes on where its last round ended.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tminus.model.catalogue import MAX_GUIDANCE, TEACHERS, usual_settings
from tminus.model.checkpoint import Checkpoint, recommend
from tminus.model.files import CheckpointError, read_json, write_json
from tminus.model.guidance import Forward
from tminus.model.machine import torch_threads
from tminus.model.rng import image_noise
from tminus.model.sampler_tables import Table, read_tables, table_file, write_table
from tminus.model.samplers import Plan, table_plan
from tminus.model.timesteps import make_timesteps
from tminus.model.training.run import example_pass, faster_of
from tminus.model.tuning.fit import Fit, Fitter, Rows, Search, search_timesteps
from tminus.model.tuning.recommend import TUNED, Trial
from tminus.model.tuning.refine import Refinement, Refiner

FEW = 4  # images, by which the precisions of gradients are timed
TEACHER_STEPS = 50  # at least, so that a table can be more exact than what it takes the place of
STARTS = ("linspace", "trailing", "karras")  # spacings that the search may begin with
RIVALS = (("dpmpp_2m", "linspace"), ("dpmpp_2m", "karras"), ("unipc", "linspace"), ("unipc", "karras"))


class TuneError(ValueError):
    """Nothing can be fitted; the message names the option, its bound and its value."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """The settings that tables are fitted by."""

    rows: int = 192  # images, of all classes alike
    held_out: int = 64  # further ones, that only judge
    teacher: str = f"dpmpp_2m:{TEACHER_STEPS}"  # sampler:steps
    seed: int = 1_000_000  # of their noise: other than what people sample and evaluate with
    batch_size: int = 64
    iterations: int = 200  # of refining the coefficients, at most

    def __post_init__(self) -> None:
        for name in ("rows", "held_out", "batch_size"):
            if getattr(self, name) < 1:
                raise TuneError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.iterations < 0:
            raise TuneError(f"iterations must be 0 or more, got {self.iterations}")


def check(checkpoint: Checkpoint, steps: Sequence[int], guidances: Sequence[float], config: TuneConfig) -> None:
    """Raise TuneError for steps, guidances and settings that this checkpoint cannot be tuned for."""
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
    """The plan of the teacher. Raises TuneError for one that cannot be."""
    sampler, _, steps = config.teacher.partition(":")
    bound = f"SAMPLER:STEPS, the sampler one of {', '.join(TEACHERS)}"
    if sampler not in TEACHERS or not steps.isdecimal():
        raise TuneError(f"teacher must be {bound}, got {config.teacher!r}")
    try:
        return checkpoint.plan(sampler, int(steps), guidance=guidance)
    except ValueError as error:
        raise TuneError(f"teacher must be {bound}, got {config.teacher!r}: {error}") from None


def default_teacher(checkpoint: Checkpoint) -> str:
    """Name the recommended sampler, where that can teach, or else the usual one, in 50 steps or more, but at most T.

    Where a table is recommended it is the teacher of that table, so that the same command finds it tuned already.
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
    """Fit a table for each number of steps at each guidance, and write it; returns the files. Raises TuneError.

    A table that is there, of these weights and settings, is left as it is. The smallest table that is good enough is
    then recommended in tminus.json (see recommend.py), unless all were there and judged before. `forward` runs the
    checkpoint's network.
    threads: of torch, where gradients are wanted and `forward` rests; None leaves them as they are.
    """
    check(checkpoint, steps, guidances, config)
    settings = dataclasses.asdict(config)
    tables = [table for table in checkpoint.tables if table.sampler == TUNED]
    done = {(table.steps, table.guidance): table for table in tables if table.about.get("settings") == settings}
    files: list[Path] = []
    precision = None if config.iterations else "fp32"  # of the gradients
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
            with torch_threads(threads):  # in bf16 a CPU without it takes twenty times as long
                few = example_pass(checkpoint.net, (FEW, *checkpoint.row_shape), device)
                precision = faster_of(checkpoint.net, few, device)
            say(f"gradients in {precision}, which is faster here")
        one = _Tuning(folder, checkpoint, fitter, guidance, config, say, threads)
        files += [one.tune(count, precision) for count in wanted]
    if files or not all(done[count, guidance].about.get("judged") for guidance in guidances for count in steps):
        _recommend(folder, checkpoint, forward, config, device, say)
    else:
        say(f"recommended as before: {checkpoint.settings} (these tables were judged already)")
    return files


def _recommend(
    folder: Path,
    checkpoint: Checkpoint,
    forward: Forward,
    config: TuneConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Compare the tables that are in the folder now, and note in tminus.json which is recommended.

    At last each table notes that it was judged. The same command does not judge it again: the sampler that it was
    compared with may be recommended no more, and another could lead to another table.
    """
    tables, _ = read_tables(
        folder,
        checkpoint.weights_hash,
        checkpoint.noise.to_dict(),
        num_timesteps=checkpoint.noise.num_train_timesteps,
        null_class=checkpoint.labels.null_class is not None,
        fractional=checkpoint.fractional,
    )
    trial, first = Trial(checkpoint, tables), config.rows + config.held_out  # of the noise that no table was fitted to
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


def state_file(folder: Path, steps: int, guidance: float) -> Path:
    """The state file of an interrupted table. It does not end in .json, which would be a table."""
    file = table_file(folder, TUNED, steps, guidance)
    return file.with_name(f".{file.name}.state")


def make_rows(checkpoint: Checkpoint, seed: int, indices: range, guidance: float, device: torch.device) -> Rows:
    """Make the rows to sample: classes in turn, without guidance the null class too, and noise of its own for each."""
    labels, null_class = None, checkpoint.labels.null_class
    if checkpoint.net.class_embedding is not None:
        kinds = checkpoint.labels.num_classes + (1 if guidance == 1 and null_class is not None else 0)
        labels = torch.arange(indices.start, indices.stop, device=device) % kinds  # the null class is the last label
    return Rows(image_noise(seed, indices, 0, checkpoint.row_shape, device), labels)


@dataclass(frozen=True, slots=True)
class _Tuning:
    """Tables of one guidance, which are fitted to one solution of the teacher."""

    folder: Path
    checkpoint: Checkpoint
    fitter: Fitter
    guidance: float
    config: TuneConfig
    say: Callable[[str], None]
    threads: int | None

    def tune(self, steps: int, precision: str) -> Path:
        """Fit the table of one number of steps, or go on with it, and write it. precision: of a new one's gradients."""
        name, began_s = f"{steps} steps at guidance {self.guidance:g}", time.monotonic()
        file, identity = state_file(self.folder, steps, self.guidance), self._identity(steps)
        known = _known(file, identity)
        if known is not None:
            began_s -= float(known.get("seconds", 0))  # as if never interrupted
            precision = known.get("precision") or precision

        def save(search: Search, **refined: Any) -> None:
            found = {"timesteps": search.best.timesteps, "round": search.round, "move": search.move}
            found |= {"tried": search.evaluations, "precision": precision, "seconds": time.monotonic() - began_s}
            file.parent.mkdir(exist_ok=True)
            write_json(file, identity | found | refined)

        # The timesteps.
        def on_round(search: Search) -> None:
            save(search)
            error = f"error {search.best.held_out:.6f} (fitted {search.best.fitted:.6f})"
            self.say(f"{name}: timesteps, round {search.round}, {error}")

        if known is not None:
            fit = self.fitter.fit(tuple(known["timesteps"]))
            search = Search(fit, known["round"], known["move"], known["tried"])
            self.say(f"{name}: goes on after round {search.round}")
        else:
            search = Search(self._best_start(steps))
        search = search_timesteps(self.fitter, search, self._settle, self.fitter.schedule.log_sigmas, on_round)
        # Without its passes: memory for the gradients.
        search = dataclasses.replace(search, best=dataclasses.replace(search.best, passes=()))

        # The coefficients.
        def on_check(refinement: Refinement) -> None:
            save(search, refinement=dataclasses.asdict(refinement))
            self.say(f"{name}: coefficients, iteration {refinement.iteration}, distance {refinement.distance:.6f}")

        begun = known["refinement"] if known is not None and {"refinement", "precision"} <= known.keys() else None
        if begun is not None and begun.keys() != {each.name for each in dataclasses.fields(Refinement)}:
            begun = None  # of another version
        with torch_threads(self.threads):
            rows, images = self.fitter.rows, self.fitter.images
            held_out, batch_size = self.config.held_out, self.config.batch_size // 2 or 1
            refiner = Refiner(
                self.checkpoint, search.best.timesteps, self.guidance, rows, images,
                held_out=held_out, precision=precision,
            )  # fmt: skip
            refinement = Refinement(**begun) if begun is not None else refiner.begin(search.best.lines)
            refinement = refiner.run(refinement, self.config.iterations, batch_size, on_check)

        # The file.
        noise, lines = self.checkpoint.noise, tuple((*line, 0.0) for line in refinement.best)
        table = Table(TUNED, steps, self.guidance, search.best.timesteps, lines)
        errors = {"tuned": self.fitter.error(table_plan(noise, self.fitter.schedule, table, clip=None))}
        for sampler, spacing in RIVALS:
            errors[f"{sampler}, {spacing}"] = self.fitter.error(self.checkpoint.plan(sampler, steps, spacing=spacing))
        about = {
            "teacher": self.config.teacher,
            "settings": dataclasses.asdict(self.config),
            "held_out_error": errors,
            "distance": {"fitted": refinement.fitted, "refined": refinement.distance},
            "timesteps_tried": search.evaluations,
            "iterations": refinement.iteration,
            "precision": precision,
            "seconds": round(time.monotonic() - began_s),
        }
        table = dataclasses.replace(table, about=about)
        written = write_table(self.folder, table, self.checkpoint.weights_hash, noise.to_dict())
        file.unlink(missing_ok=True)
        untuned = min((value, key) for key, value in errors.items() if key != "tuned")
        self.say(f"{name}: error {errors['tuned']:.6f}; that of {untuned[1]} is {untuned[0]:.6f}; {written}")
        return written

    def _identity(self, steps: int) -> dict[str, Any]:
        """The values that must be the same for an interrupted table to go on."""
        identity = {
            "weights_hash": self.checkpoint.weights_hash,
            "net": self.checkpoint.net.config.to_dict(),
            "noise": self.checkpoint.noise.to_dict(),
            "steps": steps,
            "guidance": self.guidance,
            "settings": dataclasses.asdict(self.config),
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))  # tuples are lists in the file
        return plain

    def _settle(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Round timesteps where the network takes only whole ones."""
        return tuple(timesteps) if self.checkpoint.fractional else _whole(timesteps)

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

        return min(map(fit, STARTS), key=lambda each: each.held_out)  # no list of them: each holds its passes


def _known(file: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The saved state of this table; None for a missing one, or another table's."""
    try:
        known = read_json(file)
    except CheckpointError:
        return None
    same = all(known.get(key) == value for key, value in identity.items())
    return known if same and {"timesteps", "round", "move", "tried"} <= known.keys() else None


def _whole(timesteps: Sequence[float]) -> tuple[float, ...]:
    """Round timesteps so that they fall, with room for those to come."""
    whole: list[float] = []
    for k, t in enumerate(timesteps):
        whole.append(max(min(round(t), whole[-1] - 1) if whole else round(t), len(timesteps) - 1 - k))
    return tuple(whole)
