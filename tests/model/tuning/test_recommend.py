"""The table that is recommended: the smallest that is no further from the exact solution than what it replaces."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.tuning.nets import CPU, save_net
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import Checkpoint, load_checkpoint, recommend
from tminus.model.sampler_tables import Table
from tminus.model.samplers import sample
from tminus.model.tuning.tune import Trial, Verdict, default_teacher, make_rows

TEACHER = "dpmpp_2m:25"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny network that recommends the sampler of first order in 20 steps."""
    loaded = load_checkpoint(save_net(tmp_path_factory.mktemp("recommend") / "net"))
    return dataclasses.replace(loaded, recommended=Recommended("ddim", 20, 2.0))


def as_table(checkpoint: Checkpoint, steps: int, guidance: float = 2.0) -> Table:
    """Write `dpmpp_2m` as a table; it is of second order, so in fewer steps it is as exact."""
    plan = checkpoint.plan("dpmpp_2m", steps)
    _, _, a, b, c, s, *_ = plan.lines.unbind(1)
    lines = torch.stack([a, b, c, torch.zeros_like(a), s], dim=1)
    return Table("tuned", steps, guidance, tuple(plan.timesteps.tolist()), tuple(map(tuple, lines.tolist())))


def spoiled(table: Table) -> Table:
    """A table whose images are dimmer by a third."""
    *lines, last = table.lines
    return dataclasses.replace(table, lines=(*lines, tuple(0.66 * each for each in last)))


def judged(checkpoint: Checkpoint, *tables: Table) -> Verdict:
    trial = Trial(checkpoint, tables)
    rows = make_rows(checkpoint, 5, range(40, 52), trial.plain.guidance, CPU)
    return trial.run(TEACHER, checkpoint.net, rows, batch_size=5)


def images(checkpoint: Checkpoint, sampler: str, steps: int) -> Tensor:
    rows = make_rows(checkpoint, 5, range(40, 52), 2.0, CPU)
    zero = torch.zeros_like(rows.noise)
    labels = {"class_labels": rows.class_labels, "null_class": checkpoint.labels.null_class}
    x = sample(checkpoint.net, checkpoint.plan(sampler, steps), rows.noise, lambda _: zero, guidance=2.0, **labels)  # type: ignore[arg-type]
    return x.clamp(-1, 1)


def test_the_smallest_table_that_is_as_exact_is_recommended(checkpoint: Checkpoint) -> None:
    solution = images(checkpoint, "dpmpp_2m", 50)
    plain = (images(checkpoint, "ddim", 20) - solution).square().mean().sqrt()
    errors = {n: (images(checkpoint, "dpmpp_2m", n) - solution).square().mean().sqrt() for n in (1, 2, 4, 10, 16)}
    good = [steps for steps, error in errors.items() if error <= plain]
    assert 16 in good, "or this network tells nothing"
    assert 1 not in good
    tables = {steps: as_table(checkpoint, steps) for steps in (16, *errors)}
    found = judged(checkpoint, *tables.values())
    assert found.recommended == Recommended("tuned", min(good), 2.0)
    assert f"{float(plain):.4f} by 20 steps of ddim, guidance 2" in found.why
    assert f"{float(errors[min(good)]):.4f} by {min(good)} of tuned" in found.why
    tables[min(good)] = spoiled(tables[min(good)])
    rest = [steps for steps in good if steps != min(good)]
    again = judged(checkpoint, *tables.values()).recommended
    assert again == (Recommended("tuned", rest[0], 2.0) if rest else None)


def test_where_no_table_is_as_exact_nothing_changes(checkpoint: Checkpoint) -> None:
    found = judged(checkpoint, *(spoiled(as_table(checkpoint, steps)) for steps in (4, 16)))
    assert found.recommended is None
    assert "by 4 of tuned" in found.why
    assert "by 16 of tuned" in found.why


@pytest.mark.parametrize(
    ("own", "guidance", "steps", "why"),
    [
        (
            Recommended("ddim", 20, 2.0),
            1.0,
            16,
            "no table has the guidance of 20 steps of ddim, guidance 2, and fewer than its 20 passes",
        ),
        (
            Recommended("ddim", 16, 2.0),
            2.0,
            16,
            "no table has the guidance of 16 steps of ddim, guidance 2, and fewer than its 16 passes",
        ),
        (Recommended("ddpm", 50, 2.0), 2.0, 16, "50 steps of ddpm, guidance 2 adds fresh noise"),
    ],
    ids=["other guidance", "as many steps", "noise"],
)
def test_what_does_not_compare_is_left_and_told(
    checkpoint: Checkpoint, own: Recommended, guidance: float, steps: int, why: str
) -> None:
    found = judged(dataclasses.replace(checkpoint, recommended=own), as_table(checkpoint, steps, guidance))
    assert found.recommended is None
    assert why in found.why


def test_a_table_that_is_recommended_is_judged_against_the_usual_sampler(checkpoint: Checkpoint) -> None:
    tuned = dataclasses.replace(checkpoint, recommended=Recommended("tuned", 16, 2.0))
    assert Trial(tuned, ()).plain == Recommended("dpmpp_2m", 20, 2.0)


@pytest.mark.parametrize(
    ("recommended", "about", "teacher"),
    [
        (None, {}, "dpmpp_2m:50"),
        (Recommended("unipc", 10, 1.5), {}, "unipc:50"),
        (Recommended("ddpm", 50), {}, "dpmpp_2m:50"),
        (Recommended("tuned", 4, 2.0), {"teacher": "ddim:30"}, "ddim:30"),
        (Recommended("tuned", 4, 2.0), {}, "dpmpp_2m:50"),
    ],
)
def test_the_teacher_is_finer_than_what_a_table_is_to_replace(
    checkpoint: Checkpoint, recommended: Recommended | None, about: dict[str, str], teacher: str
) -> None:
    tables = (dataclasses.replace(as_table(checkpoint, 4), about=about),)
    given = dataclasses.replace(checkpoint, recommended=recommended, tables=tables)
    assert default_teacher(given) == teacher
    noise = dataclasses.replace(checkpoint.noise, num_train_timesteps=9)
    few = dataclasses.replace(checkpoint, recommended=None, noise=noise)
    assert default_teacher(few) == "dpmpp_2m:9"


def test_passes_count_and_not_steps(checkpoint: Checkpoint) -> None:
    """Ten steps of heun are nineteen passes."""
    trial = Trial(
        dataclasses.replace(checkpoint, recommended=Recommended("heun", 10, 2.0)),
        [as_table(checkpoint, steps) for steps in (20, 19, 18, 9)],
    )
    assert [table.steps for table in trial.tables] == [9, 18]


def test_what_is_noted_leaves_the_rest_of_the_file_and_the_weights_as_they_are(tmp_path: Path) -> None:
    folder = save_net(tmp_path / "net")
    before = load_checkpoint(folder)
    recommend(folder, Recommended("ddim", 7, 1.5))
    after = load_checkpoint(folder)
    assert (before.recommended, after.recommended) == (None, Recommended("ddim", 7, 1.5))
    assert (after.weights_hash, after.labels, after.name) == (before.weights_hash, before.labels, before.name)
