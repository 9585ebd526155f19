import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tminus.model.evaluation.result_cache import ResultCache, plan_hash
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


def test_a_batch_is_read_as_it_was_written_by_the_same_key_and_images_only(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 2, 4, 4), dtype=torch.uint8).to(memory_format=torch.channels_last)
    ResultCache(tmp_path).batches(KEY).write(range(3, 6), images, 1.5)
    batches = ResultCache(tmp_path).batches(dict(reversed(KEY.items())))
    read = batches.read(range(3, 6))
    assert read is not None
    assert torch.equal(read, images)
    assert batches.seconds == 1.5
    assert batches.read(range(3)) is None
    assert batches.read(range(3, 7)) is None
    assert ResultCache(tmp_path).batches(KEY | {"seed": 0}).read(range(3, 6)) is None
    ResultCache(tmp_path).batches(KEY | {"seed": 0}).forget()
    assert batches.read(range(3, 6)) is not None, "those of others stay"
    batches.forget()
    assert batches.read(range(3, 6)) is None


@pytest.mark.parametrize("damage", ["cut off", "of another key", "no images"])
def test_a_damaged_batch_counts_as_not_there(tmp_path: Path, damage: str) -> None:
    batches = ResultCache(tmp_path).batches(KEY)
    batches.write(range(2), torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 1.0)
    (file,) = tmp_path.iterdir()
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "of another key":
        file.write_bytes(file.read_bytes().replace(b"1.5", b"1.6"))
    else:
        save_file({"other": torch.zeros(1)}, file)
    assert batches.read(range(2)) is None
    assert batches.seconds == 0


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
