import dataclasses
from pathlib import Path

import torch

from tminus.model.evaluation.evaluate import ResultCache, plan_hash
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import compile_plan

KEY = {"seed": 2**64 - 1, "interval": (1, 2), "guidance": 1.5, "none": None}


def test_a_result_is_read_as_it_was_written_by_the_same_key_only(tmp_path: Path) -> None:
    kept = ResultCache(tmp_path / "kept")
    assert kept.read(KEY) is None
    kept.write(KEY, {"figure": 0.1})
    assert kept.read(dict(reversed(KEY.items()))) == {"figure": 0.1}
    assert ResultCache(tmp_path / "kept").read(KEY) == {"figure": 0.1}
    for change in ({"seed": 0}, {"interval": (1, 3)}, {"more": 1}):
        assert kept.read(KEY | change) is None


def test_a_plan_s_hash_is_that_of_all_that_it_holds() -> None:
    noise = NoiseConfig(num_train_timesteps=20)
    plan = compile_plan(noise, noise.schedule(), "ddim", 4)
    assert plan_hash(plan) == plan_hash(compile_plan(noise, noise.schedule(), "ddim", 4))
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, torch.Tensor):
            changed = value.clone()
            changed.view(-1)[-1] += 1
            assert plan_hash(dataclasses.replace(plan, **{field.name: changed})) != plan_hash(plan)
    others = [("ddpm", 4, {}), ("ddim", 5, {}), ("ddim", 4, {"eta": 1.0}), ("ddim", 4, {"spacing": "trailing"})]
    hashes = {plan_hash(compile_plan(noise, noise.schedule(), name, n, **more)) for name, n, more in others}  # type: ignore[arg-type]
    assert len(hashes | {plan_hash(plan)}) == 5
