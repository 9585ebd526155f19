"""Where plans lie on the device: no two share a line, freed lines are used again, and registers begin at zero.

And which specs share a compiled plan.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tminus.model.catalogue import SAMPLERS
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import Plan, compile_plan
from tminus.service.engine.row_state import FIRST_LINES, PlanCompiler, PlanStore, Registers
from tminus.service.spec import SampleSpec

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NOISE = NoiseConfig()
SCHEDULE = NOISE.schedule()


def plan(sampler: str, steps: int) -> Plan:
    return compile_plan(NOISE, SCHEDULE, sampler, steps, fractional=True)


def assert_holds(store: PlanStore, start: int, one: Plan) -> None:
    at = slice(start, start + len(one))
    assert torch.equal(store.timesteps[at], one.timesteps.float())
    assert torch.equal(store.lines[at], one.lines.float())
    assert torch.equal(store.known[at], one.known.float())
    if one.matrices is not None:
        assert store.matrices is not None
        R = one.num_registers
        assert torch.equal(store.matrices[at, : 1 + R, : 4 + R], one.matrices.float())
        assert not store.matrices[at, 1 + R :].any()
        assert not store.matrices[at, :, 4 + R :].any()


@given(st.lists(st.tuples(st.sampled_from(SAMPLERS), st.integers(1, 450), st.integers(0, 3)), max_size=14))
def test_plans_that_come_and_go_keep_their_lines(asked: list[tuple[str, int, int]]) -> None:
    store, held = PlanStore(CPU), list[tuple[int, Plan]]()
    for sampler, steps, ended in asked:
        one = plan(sampler, steps)
        held.append((store.put(one), one))
        for _ in range(min(ended, len(held) - 1)):
            start, old = held.pop(0)
            store.free(start, len(old))
        for start, each in held:
            assert_holds(store, start, each)
    for start, each in held:
        store.free(start, len(each))
    assert store._free == [(0, len(store.lines))], "all is free, in one piece"


def test_the_store_grows_only_where_plans_need_it_and_makes_matrices_only_for_registers() -> None:
    store = PlanStore(CPU)
    start, one = store.put(plan("ddpm", 1000)), plan("ddpm", 1000)
    assert len(store.lines) == FIRST_LINES
    store.free(start, len(one))
    for sampler in ("ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler", "ddpm"):
        start = store.put(plan(sampler, 200))
    assert (len(store.lines), store.matrices) == (FIRST_LINES, None)
    store.put(plan("unipc", 100))
    assert len(store.lines) == 2 * FIRST_LINES
    assert store.matrices is not None
    store.free(start, 200)
    assert store.put(plan("ddim", 190)) == start
    assert len(store.lines) == 2 * FIRST_LINES


def test_registers_are_those_of_their_row_and_hold_nothing_of_the_row_before() -> None:
    """Infinity left in a slot would make NaN of the zeros of a matrix."""
    registers = Registers(4, (1, 2, 2), CPU)
    rows = torch.tensor([1, 3])
    registers.put(rows, torch.full((2, 3, 1, 2, 2), torch.inf))
    registers.put(rows, torch.ones(2, 1, 1, 2, 2))
    assert registers.read(rows, 3).flatten(2).sum(2).tolist() == [[4.0, 0.0, 0.0]] * 2
    matrices = torch.zeros(2, 4, 7)
    matrices[:, 0, 4], matrices[:, 1, 0] = 2.0, 5.0  # x' = 2 h1, h1' = 5 x
    x = torch.full((2, 1, 2, 2), 7.0)
    new = registers.combine(rows, matrices, [x, x, x, x])
    assert new.unique().tolist() == [2.0]
    assert registers.read(rows, 1).unique().tolist() == [35.0]
    assert registers.read(torch.tensor([0, 2]), 3).unique().tolist() == [0.0]


SPEC = SampleSpec(
    n=1, steps=10, sampler="ddim", eta=0.0, seed=0, index=0, class_labels=None, guidance=1.0, guidance_interval=None,
    timestep_spacing="leading", clip=True,
)  # fmt: skip
IN_A_PLAN: list[dict[str, Any]] = [
    {"sampler": "ddpm"}, {"steps": 11}, {"eta": 0.5}, {"timestep_spacing": "trailing"}, {"clip": False},
    {"strength": 0.5},
]  # fmt: skip


def compiler() -> PlanCompiler:
    model: Any = SimpleNamespace(fractional=True)
    return PlanCompiler(model, NOISE)


@given(st.lists(st.sampled_from(IN_A_PLAN), unique_by=str))
def test_a_plan_that_was_kept_is_that_of_its_spec(changes: list[dict[str, Any]]) -> None:
    plans = compiler()
    for change in [{}, *changes, {}]:
        spec = replace(SPEC, **change)
        expected = compile_plan(
            NOISE, SCHEDULE, spec.sampler, spec.steps, eta=spec.eta, clip=spec.clip, spacing=spec.timestep_spacing,
            start=spec.start, fractional=True,
        )  # fmt: skip
        got = plans.plan(spec)
        assert torch.equal(got.lines, expected.lines)
        assert torch.equal(got.timesteps, expected.timesteps)


def test_specs_that_differ_in_what_no_plan_holds_share_one() -> None:
    plans = compiler()
    other = replace(SPEC, n=3, seed=7, index=4, class_labels=(1, 2, None), guidance=2.0, guidance_interval=(0, 10))
    assert plans.plan(SPEC) is plans.plan(other)
