"""`tminus tune`: fit tables of few steps to a checkpoint, one after the other, each written as soon as it is done.

What a table is fitted to are a function of the settings, so a run that was killed goes on where its last round ended.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.files import CheckpointError, read_json, write_json
from tminus.model.recommended import MAX_GUIDANCE
from tminus.model.rng import image_noise
from tminus.model.samplers import Forward
from tminus.model.tables import FOLDER, Table, write_table
from tminus.model.timesteps import make_timesteps
from tminus.model.tuning.fit import Fit, Fitter, Rows
from tminus.model.tuning.search import Search, search_timesteps

log = logging.getLogger(__name__)

STATE_FILE = ".tune-state.json"
SAMPLER = "tuned"
STARTS = ("linspace", "trailing", "karras")  # spacings that the search may begin with
RIVALS = (("dpmpp_2m", "linspace"), ("dpmpp_2m", "karras"), ("unipc", "linspace"), ("unipc", "karras"))


class TuneError(Exception):
    """Nothing can be fitted; the message names the option, its bound and its value."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """What tables are fitted to."""

    rows: int = 192  # images, of all classes alike
    held_out: int = 64  # further ones, that only judge
    teacher_steps: int = 100
    seed: int = 1_000_000  # of their noise: other than what people sample and evaluate with
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("rows", "held_out", "teacher_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TuneError(f"{name} must be 1 or more, got {getattr(self, name)}")


def check(checkpoint: Checkpoint, steps: Sequence[int], guidances: Sequence[float], config: TuneConfig) -> None:
    """Raise TuneError for what this checkpoint cannot be tuned for."""
    T, labels = checkpoint.noise.num_train_timesteps, checkpoint.labels
    if checkpoint.student is not None:
        raise TuneError(f"{checkpoint.name}: a student has its own tables, and no many-step solution to be tuned to")
    if not steps or not guidances:
        raise TuneError(f"{'steps' if not steps else 'guidance'} must name at least one")
    for count in steps:
        if not 1 <= count <= T:
            raise TuneError(f"steps must be in 1..{T}, got {count}")
        if count >= config.teacher_steps:
            raise TuneError(f"steps must be fewer than the teacher's {config.teacher_steps}, got {count}")
    if config.teacher_steps > T:
        raise TuneError(f"teacher_steps must be in 1..{T}, got {config.teacher_steps}")
    for guidance in guidances:
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise TuneError(f"guidance must be in 0..{MAX_GUIDANCE:g}, got {guidance:g}")
        if guidance != 1 and labels.null_class is None:
            what = "no classes" if checkpoint.net.class_embedding is None else "no null class"
            raise TuneError(f"guidance must be 1 (off), since {checkpoint.name} has {what}, got {guidance:g}")
    if checkpoint.noise.schedule().alpha_bar[-1] <= 0:
        raise TuneError(f"{checkpoint.name}: its schedule ends without signal (alpha_bar = 0), where nothing is fitted")


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
) -> list[Path]:
    """Fit a table for each number of steps at each guidance, and write it; returns the files. Raises TuneError.

    A table that is there, of these weights and settings, is left as it is. `forward` runs the checkpoint's network.
    """
    check(checkpoint, steps, guidances, config)
    files = []
    for guidance in guidances:
        wanted = [count for count in sorted(set(steps)) if not _is_done(checkpoint, count, guidance, config)]
        for count in sorted(set(steps) - set(wanted)):
            say(f"{count} steps at guidance {guidance:g}: tuned already")
        if not wanted:
            continue
        fitter = Fitter(
            checkpoint,
            forward,
            make_rows(checkpoint, config, guidance, device),
            guidance,
            held_out=config.held_out,
            batch_size=config.batch_size,
        )
        log_sigmas = fitter.schedule.log_sigmas
        teacher = make_timesteps("dpmpp_2m", "karras", config.teacher_steps, len(log_sigmas), 0, log_sigmas)
        say(
            f"guidance {guidance:g}: the teacher's {config.teacher_steps} steps for {config.rows + config.held_out} images"
        )
        fitter.solve(teacher, lambda: None)
        files += [_tune_one(folder, checkpoint, fitter, each, guidance, config, say) for each in wanted]
    return files


def make_rows(checkpoint: Checkpoint, config: TuneConfig, guidance: float, device: torch.device) -> Rows:
    """What is sampled: classes in turn, without guidance the null class among them, and a noise of its own each."""
    count, labels, null_class = config.rows + config.held_out, None, checkpoint.labels.null_class
    if checkpoint.net.class_embedding is not None:
        kinds = checkpoint.labels.num_classes + (1 if guidance == 1 and null_class is not None else 0)
        labels = torch.arange(count, device=device) % kinds  # the null class is the last label
    shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
    return Rows(image_noise(config.seed, range(count), 0, shape, device), labels)


def _tune_one(
    folder: Path,
    checkpoint: Checkpoint,
    fitter: Fitter,
    steps: int,
    guidance: float,
    config: TuneConfig,
    say: Callable[[str], None],
) -> Path:
    started, passes, log_sigmas = time.monotonic(), fitter.passes, fitter.schedule.log_sigmas
    state, name = folder / FOLDER / STATE_FILE, f"{steps} steps at guidance {guidance:g}"
    identity = _identity(checkpoint, steps, guidance, config)

    def settle(timesteps: Sequence[float]) -> tuple[float, ...]:
        if checkpoint.fractional:
            return tuple(timesteps)
        whole: list[float] = []
        for k, t in enumerate(timesteps):  # falling, and room for those to come
            whole.append(max(min(round(t), whole[-1] - 1) if whole else round(t), len(timesteps) - 1 - k))
        return tuple(whole)

    def on_round(search: Search) -> None:
        (folder / FOLDER).mkdir(exist_ok=True)
        known = {"timesteps": search.best.timesteps, "round": search.round, "move": search.move}
        write_json(state, identity | known | {"evaluations": search.evaluations})
        say(f"{name}: round {search.round}, error {search.best.held_out:.6f} (fitted {search.best.fitted:.6f})")

    begun = _begun(state, identity)
    if begun is not None:
        search = Search(fitter.fit(begun["timesteps"]), begun["round"], begun["move"], begun["evaluations"])
        say(f"{name}: goes on after round {search.round}")
    else:
        search = Search(_best_start(fitter, checkpoint, steps, settle))
    search = search_timesteps(fitter, search, settle, log_sigmas, on_round)
    rivals = {f"{sampler}, {spacing}": error for sampler, spacing, error in _rivals(fitter, checkpoint, steps)}
    about = {
        "teacher": f"dpmpp_2m, {config.teacher_steps} steps, karras",
        "settings": dataclasses.asdict(config),
        "error": {"held_out": search.best.held_out, "fitted": search.best.fitted},
        "error_of": rivals,
        "evaluations": search.evaluations,
        "row_passes": fitter.passes - passes,
        "seconds": round(time.monotonic() - started),
    }
    table = Table(SAMPLER, steps, guidance, search.best.timesteps, search.best.lines, about)
    file = write_table(folder, table, checkpoint.weights_hash, checkpoint.noise.to_dict())
    state.unlink(missing_ok=True)
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    versus = f"; that of {best} is {rivals[best]:.6f}" if best is not None else ""
    say(f"{name}: error {search.best.held_out:.6f}{versus}; {file}")
    return file


def _best_start(
    fitter: Fitter, checkpoint: Checkpoint, steps: int, settle: Callable[[Sequence[float]], tuple[float, ...]]
) -> Fit:
    log_sigmas = fitter.schedule.log_sigmas
    starts = []
    for spacing in STARTS:
        sampler = "euler" if spacing == "karras" else "dpmpp_2m"
        t = make_timesteps(sampler, spacing, steps, len(log_sigmas), 0, log_sigmas, fractional=checkpoint.fractional)
        starts.append(fitter.fit(settle(t)))
    return min(starts, key=lambda fit: fit.held_out)


def _rivals(fitter: Fitter, checkpoint: Checkpoint, steps: int) -> list[tuple[str, str, float]]:
    return [
        (sampler, spacing, fitter.error(checkpoint.plan(sampler, steps, spacing=spacing)))
        for sampler, spacing in RIVALS
    ]


def _identity(checkpoint: Checkpoint, steps: int, guidance: float, config: TuneConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    return {"weights_hash": checkpoint.weights_hash, "steps": steps, "guidance": guidance, "settings": settings}


def _begun(state: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted run of this very table has left; None for nothing, or another's."""
    try:
        known = read_json(state)
        same = all(known.get(key) == value for key, value in identity.items())
        sound = {"timesteps", "round", "move", "evaluations"} <= known.keys()
        return known | {"timesteps": tuple(known["timesteps"])} if same and sound else None
    except (CheckpointError, TypeError):
        return None


def _is_done(checkpoint: Checkpoint, steps: int, guidance: float, config: TuneConfig) -> bool:
    settings = dataclasses.asdict(config)
    return any(
        (table.sampler, table.steps, table.guidance) == (SAMPLER, steps, guidance)
        and json.loads(json.dumps(table.about.get("settings"))) == settings
        for table in checkpoint.tables
    )
