"""The steps an edit takes and what they cost: no engine runs here."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.conftest import TABLES_OF_50
from tests.service.fakes import INFO, make_spec
from tminus.model.catalogue import SAMPLERS
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import Table
from tminus.model.samplers import compile_plan, table_plan
from tminus.model.timesteps import make_timesteps
from tminus.model.trajectory import Selection
from tminus.service.scheduling.forecast import Pending, Speed, forecast
from tminus.service.scheduling.scheduler import BatchPolicy, TickTimes
from tminus.service.work import Work, noisy_passes, select_passes, timesteps_of, work_of


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [
        (10, 0.3, 3), (10, 0.7, 7), (100, 0.29, 29), (100, 0.57, 57), (50, 0.58, 29), (1000, 0.001, 1), (10, 0.05, 1),
        (10, 1e-9, 1), (10, 0.99, 9), (10, 1.0, 10), (10, 1, 10), (1, 0.5, 1), (3, 1 / 3, 1), (3, 2 / 3, 2),
    ],
)  # fmt: skip
def test_the_last_strength_of_the_steps_is_taken(steps: int, strength: float, taken: int) -> None:
    """0.29 * 100 is 28.999999999999996, which int() cuts to 28; diffusers then takes 28."""
    spec = make_spec(steps=steps, strength=strength)
    assert (spec.num_passes, spec.start) == (taken, steps - taken)
    assert work_of(spec, INFO).places == taken


@given(st.integers(1, 1000), st.floats(0, 1, exclude_min=True))
def test_as_many_steps_as_diffusers_takes_or_the_one_that_rounding_took_from_it(steps: int, strength: float) -> None:
    spec = make_spec(steps=steps, strength=strength)
    assert 1 <= spec.num_passes <= steps
    assert spec.num_passes in {max(1, min(int(steps * strength), steps)), int(steps * strength + 1e-8)}


def test_what_is_left_out_costs_nothing_guided_or_not() -> None:
    fields = {"n": 2, "steps": 10, "strength": 0.4}
    assert work_of(make_spec(**fields), INFO) == Work(2, 10, range(0), 6)
    guided = work_of(make_spec(**fields, guidance=2.0), INFO)
    assert (guided.guided, guided.places) == (range(6, 10), 16)
    t = timesteps_of(make_spec(**fields), INFO)
    assert list(t) == make_timesteps("ddpm", "leading", 10, 1000)[6:]
    part = work_of(make_spec(**fields, guidance=2.0, guidance_interval=(t[2], t[1])), INFO)
    assert (part.guided, part.places) == (range(7, 9), 12)
    above = work_of(make_spec(**fields, guidance=2.0, guidance_interval=(t[0] + 1, 999)), INFO)
    assert (above.guided, above.places) == (range(0), 8), "guided only at steps that are not taken"


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 999), st.integers(0, 999), st.integers(1, 3))
def test_the_forecast_of_an_edit_is_what_its_steps_take(steps: int, strength: float, a: int, b: int, n: int) -> None:
    spec = make_spec(n=n, steps=steps, strength=strength, guidance=2.0, guidance_interval=(min(a, b), max(a, b)))
    work = work_of(spec, INFO)
    times = TickTimes(((1, 1.0), (8, 8.0)))
    expected = sum(times.seconds(n * work.places_per_row(step)) for step in range(work.start, steps))
    found = forecast([Pending("a", work, work.places)], {0: Speed(BatchPolicy.of(8, times=times), 100)})["a"]
    assert found.eta_s == pytest.approx(expected)
    assert work.places == n * sum(work.places_per_row(step) for step in range(work.start, steps))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("steps", "strength", "eta"), [(1, None, 0.0), (2, None, 0.0), (9, None, 0.7), (9, 0.1, 0.7)])
def test_noisy_passes_are_those_of_the_plan(sampler: str, steps: int, strength: float | None, eta: float) -> None:
    noise = NoiseConfig()
    spec = make_spec(sampler=sampler, steps=steps, strength=strength, eta=eta)
    plan = compile_plan(noise, noise.schedule(), sampler, steps, eta=eta, start=spec.start, fractional=True)
    assert list(noisy_passes(spec, INFO)) == plan.numbers().noisy.tolist()


@pytest.mark.parametrize("table", TABLES_OF_50)
@pytest.mark.parametrize("strength", [None, 0.7])
def test_noisy_passes_of_a_table_are_those_of_its_lines(table: Table, strength: float | None) -> None:
    noise = NoiseConfig(num_train_timesteps=50)
    spec = make_spec(sampler="tuned", steps=table.steps, table=table.hash, strength=strength)
    plan = table_plan(noise, noise.schedule(), table, clip=None, start=spec.start)
    assert list(noisy_passes(spec, replace(INFO, tables=TABLES_OF_50))) == plan.numbers().noisy.tolist()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_a_selection_has_every_prediction_that_the_plan_looks_at(sampler: str) -> None:
    noise, spec = NoiseConfig(), make_spec(sampler=sampler, steps=9, eta=0.7)
    lines = compile_plan(noise, noise.schedule(), sampler, 9, eta=0.7).numbers().lines
    for k in range(8):
        assert select_passes([k], spec, INFO).predictions == ((k - 1, k) if lines[k, 4] else (k,))


def test_a_selection_of_a_table_looks_back_as_far_as_its_lines() -> None:
    timesteps = (49.0, 30.0, 12.0)
    for line, predictions in (
        ((0.4, 0.9, 0, 0, 0.2), (2,)),
        ((0.4, 0.9, -0.3, 0, 0.2), (1, 2)),
        ((0.4, 0.9, -0.3, 0.05, 0.2), (0, 1, 2)),
    ):
        table = Table("tuned", 3, 1.0, timesteps, ((0.9, 0.1, 0, 0, 0.3), (0.9, 0.1, 0, 0, 0), line))
        spec, model = make_spec(sampler="tuned", steps=3, table=table.hash), replace(INFO, tables=(table,))
        assert select_passes([2], spec, model).predictions == predictions
        with pytest.raises(ValueError, match="one or more add noise"):
            select_passes([1], spec, model)
        assert select_passes(None, spec, model) == Selection.whole(3)
