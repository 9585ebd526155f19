"""`tminus tune` on tiny nets: what is fitted, and that an interrupted run ends as an undisturbed one."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Checkpoint, Labels, load_checkpoint, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import table_plan
from tminus.model.tables import FOLDER
from tminus.model.tuning.fit import Fitter, least_squares
from tminus.model.tuning.refine import Refiner
from tminus.model.tuning.search import Search, moved, search_timesteps
from tminus.model.tuning.tune import STATE_FILE, TuneConfig, TuneError, check, make_rows, tune
from tminus.model.unet import UNet2D

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NOISE = NoiseConfig(num_train_timesteps=50, beta_end=0.1)
CONFIG = TuneConfig(rows=12, held_out=4, teacher_steps=25, batch_size=8, iterations=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny network of three classes and a null class."""
    config = dataclasses.replace(TINY, num_class_embeds=4)
    net = UNet2D(config)
    randomize(net)
    save_checkpoint(tmp_path / "net", net.state_dict(), config, NOISE, Labels(("a", "b", "c"), 3), {})
    return tmp_path / "net"


def fitter_of(checkpoint: Checkpoint, config: TuneConfig = CONFIG, guidance: float = 1.0) -> Fitter:
    rows = make_rows(checkpoint, config, guidance, CPU)
    fitter = Fitter(checkpoint, checkpoint.net, rows, guidance, held_out=config.held_out, batch_size=5)
    fitter.solve([float(t) for t in range(49, -1, -2)], lambda: None)
    return fitter


def test_least_squares_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 40, 1, 4, 4, generator=generator)
    target = 0.5 * inputs[0] - 2 * inputs[2] + 0.1 * torch.randn(40, 1, 4, 4, generator=generator)
    expected = np.linalg.lstsq(inputs.flatten(1).double().numpy().T, target.flatten().double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(least_squares(inputs, target).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teachers_way_is_its_sampler(folder: Path, guidance: float) -> None:
    """DPM-Solver++(2M) by the plain loop, of which the engine's own tests hold every step to diffusers."""
    from tminus.model.samplers import sample

    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint, guidance=guidance)
    plan = checkpoint.plan("dpmpp_2m", 25, spacing="trailing")
    assert plan.timesteps.tolist() == list(range(49, -1, -2))
    zero = torch.zeros_like(fitter.rows.noise)
    expected = sample(
        checkpoint.net, plan, fitter.rows.noise, lambda _k: zero, class_labels=fitter.rows.class_labels, null_class=3,
        guidance=guidance,
    )  # fmt: skip
    torch.testing.assert_close(fitter.images, expected, rtol=0, atol=2e-3)  # it is kept in float16


def test_a_fitted_table_is_nearer_to_the_teacher_than_untuned_solvers_on_rows_it_has_not_seen(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint, dataclasses.replace(CONFIG, rows=60, held_out=30))
    fit = fitter.fit((49.0, 30.0, 15.0, 5.0))
    untuned = [fitter.error(checkpoint.plan(name, 4, spacing="trailing")) for name in ("ddim", "dpmpp_2m", "unipc")]
    assert fit.held_out < min(untuned)
    assert fit.lines[0][2:] == (0.0, 0.0, 0.0), "nothing is before the first step"
    assert fit.lines[1][3:] == (0.0, 0.0)


def test_a_table_gives_in_the_engines_rule_what_its_fit_says(folder: Path) -> None:
    from tminus.model.tables import Table

    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 30.5, 15.0, 5.0))
    table = Table("tuned", 4, 1.0, fit.timesteps, fit.lines)
    assert fitter.error(table_plan(NOISE, NOISE.schedule(), table, clip=None)) == pytest.approx(fit.held_out, rel=1e-4)


def test_a_fit_that_begins_like_the_one_before_is_the_same_as_from_the_start(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter, fresh = fitter_of(checkpoint), fitter_of(checkpoint)
    fitter.fit((49.0, 30.0, 15.0, 5.0))
    passes = fitter.passes
    again = fitter.fit((49.0, 30.0, 12.0, 5.0))
    assert fitter.passes - passes == 3 * 16, "the first step is not taken again"
    assert again == fresh.fit((49.0, 30.0, 12.0, 5.0))


def test_the_search_only_ever_gets_nearer_and_ends(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    begun = Search(fitter.fit((49.0, 46.0, 43.0)))
    rounds: list[Search] = []
    found = search_timesteps(fitter, begun, tuple, fitter.schedule.log_sigmas, rounds.append)
    errors = [begun.best.held_out, *(each.best.held_out for each in rounds)]
    assert errors == sorted(errors, reverse=True)
    assert found.best.held_out < begun.best.held_out
    assert found.best.timesteps[0] == 49
    assert all(now > then for now, then in zip(found.best.timesteps, found.best.timesteps[1:], strict=False))


@pytest.mark.parametrize("share", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_a_moved_timestep_stays_between_its_neighbours(k: int, share: float) -> None:
    log_sigmas = NOISE.schedule().log_sigmas
    t = moved((49.0, 20.0, 0.5), k, 0.9 * share, log_sigmas)
    assert t[0] > t[1] > t[2] >= 0
    assert (t[k] > (49.0, 20.0, 0.5)[k]) == (share > 0)


def test_the_gradient_of_the_distance_is_that_of_finite_differences(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4, bfloat16=False)
    picked, C = torch.arange(6), torch.tensor([list(line[:4]) for line in fit.lines], requires_grad=True)

    def distance(C: Tensor) -> Tensor:
        return refiner.distance(refiner.images(C, picked), picked, torch.Generator().manual_seed(0))

    (gradient,) = torch.autograd.grad(distance(C), C)
    for at in [(0, 0), (1, 1), (2, 1), (2, 2)]:
        step = torch.zeros_like(C)
        step[at] = 2e-3
        with torch.no_grad():
            slope = (distance(C + step) - distance(C - step)) / 4e-3
        assert gradient[at].item() == pytest.approx(slope.item(), rel=0.1, abs=1e-4)


def test_refining_keeps_the_best_that_unseen_rows_have_found(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4)
    begun = refiner.begin(fit.lines)
    done = refiner.run(begun, 30, 6, lambda _state: None)
    assert done.iteration == 30
    assert done.distance <= begun.distance
    assert refiner.judge(done.best) == pytest.approx(done.distance, rel=1e-6)


def run(folder: Path, *, steps: tuple[int, ...] = (3,), guidance: float = 1.0, stop_at: str | None = None) -> list[str]:
    """Tune; stop_at kills the run when a line of its progress has these words."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if stop_at is not None and stop_at in line:
            raise KeyboardInterrupt

    checkpoint = load_checkpoint(folder)
    tune(folder, checkpoint, checkpoint.net, steps, [guidance], CONFIG, device=CPU, say=say)
    return said


def table_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / FOLDER / "tuned-3.json").read_text())
    return {key: value[key] for key in ("timesteps", "lines")}


@pytest.mark.parametrize("stop_at", ["timesteps, round 1", "timesteps, round 3", "coefficients, iteration 3"])
def test_a_run_that_was_killed_goes_on_and_ends_as_one_that_was_not(folder: Path, tmp_path: Path, stop_at: str) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    run(folder)
    with pytest.raises(KeyboardInterrupt):
        run(other, stop_at=stop_at)
    assert (other / FOLDER / STATE_FILE).is_file()
    assert load_checkpoint(other).tables == (), "no half-finished table"
    assert any("goes on after round" in line for line in run(other))
    assert table_of(other) == table_of(folder)
    assert not (other / FOLDER / STATE_FILE).exists()


def test_a_table_that_is_there_is_left_and_one_of_other_settings_is_made_anew(folder: Path) -> None:
    run(folder, steps=(2, 3))
    loaded = load_checkpoint(folder)
    assert [(table.steps, table.guidance) for table in loaded.tables] == [(2, 1.0), (3, 1.0)]
    assert loaded.samplers[-1] == "tuned"
    assert loaded.tables[0].about["held_out_error"].keys() > {"tuned"}
    before = (folder / FOLDER / "tuned-3.json").stat().st_mtime_ns
    assert run(folder, steps=(3,)) == ["3 steps at guidance 1: tuned already"]
    assert (folder / FOLDER / "tuned-3.json").stat().st_mtime_ns == before
    run(folder, steps=(3,), guidance=2.0)
    assert [(table.steps, table.guidance) for table in load_checkpoint(folder).tables] == [(2, 1.0), (3, 1.0), (3, 2.0)]


BAD: dict[str, tuple[Callable[[Checkpoint], Checkpoint], tuple[int, ...], float, dict[str, int], str]] = {
    "no classes": (
        lambda checkpoint: dataclasses.replace(checkpoint, labels=Labels(("a", "b", "c", "d"), None)),
        (3,), 2.0, {}, r"guidance must be 1 \(off\), since net has no null class, got 2",
    ),
    "zero steps": (lambda checkpoint: checkpoint, (0,), 1.0, {}, r"steps must be in 1\.\.50, got 0"),
    "more than T": (lambda checkpoint: checkpoint, (51,), 1.0, {}, r"steps must be in 1\.\.50, got 51"),
    "as many as the teacher": (lambda checkpoint: checkpoint, (25,), 1.0, {}, "fewer than the teacher's 25, got 25"),
    "guidance": (lambda checkpoint: checkpoint, (3,), 51.0, {}, r"guidance must be in 0\.\.50, got 51"),
    "none": (lambda checkpoint: checkpoint, (), 1.0, {}, "steps must name at least one"),
    "teacher": (lambda checkpoint: checkpoint, (3,), 1.0, {"teacher_steps": 51}, r"teacher_steps must be in 1\.\.50"),
    "rows": (lambda checkpoint: checkpoint, (3,), 1.0, {"rows": 0}, "rows must be 1 or more, got 0"),
    "a student": (
        lambda checkpoint: dataclasses.replace(checkpoint, student={}), (3,), 1.0, {}, "a student has its own tables",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "steps", "guidance", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_tuned_is_refused(
    folder: Path,
    change: Callable[[Checkpoint], Checkpoint],
    steps: tuple[int, ...],
    guidance: float,
    settings: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(TuneError, match=message):
        check(change(load_checkpoint(folder)), steps, [guidance], dataclasses.replace(CONFIG, **settings))
