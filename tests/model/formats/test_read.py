from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.model.formats.conftest import randomised
from tests.model.formats.ho import Ho
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats.given import Given
from tminus.model.formats.read import convert, read_foreign

CIFAR = Given(image_size=16, timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_large")


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return randomised(Ho(blocks=1)).state_dict()


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_foreign(file, CIFAR)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_weights_are_read_from_each_kind_of_file(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.ckpt")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "parallel.pt")
    save_file(state, tmp_path / "safe.safetensors")
    hashes = set()
    for file in ("plain.ckpt", "parallel.pt", "safe.safetensors"):
        convert(tmp_path / file, tmp_path / f"{file}-out", CIFAR)
        hashes.add(load_checkpoint(tmp_path / f"{file}-out").weights_hash)
    assert len(hashes) == 1


def test_weights_of_half_precision_are_read_in_float32(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "out", CIFAR)
    weights = load_checkpoint(tmp_path / "out").net.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights["conv_in.weight"], state["conv_in.weight"].half().float())


class Opens:
    def __reduce__(self) -> Any:
        return (open, ("/tmp/opened-by-a-pickle", "w"))


def test_file_that_is_no_checkpoint_is_told_in_one_line(state: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"weights": Opens()}, file)
    assert "a pickle with code is never run" in refusal(file)
    assert not Path("/tmp/opened-by-a-pickle").exists()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "a pointer of Git LFS" in refusal(file)
    file.write_bytes(b"\x00" * 100)
    assert "it is not plain tensors" in refusal(file)
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-5000])
    assert "truncated or not a weights file" in refusal(file)
    torch.save({"state_dict": state, "epoch": 3}, file)
    assert "must hold a state dict of tensors, got a dict of state_dict, epoch" in refusal(file)
    torch.save({"layer.weight": torch.ones(2)}, file)
    assert "of no format that is known" in refusal(file)
    assert "its first weight is 'layer.weight'" in refusal(file)
    torch.save({}, file)
    assert "hold no tensors" in refusal(file)
    torch.save({key: value.to(torch.int8) for key, value in state.items()}, file)
    assert "must be of float32, float16, bfloat16, float64, got torch.int8" in refusal(file)


def test_weights_that_are_not_finite_leave_no_folder(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**state, "conv_in.bias": torch.full((32,), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"conv_in\.bias holds NaN"):
        convert(tmp_path / "nan.pt", tmp_path / "out", CIFAR)
    assert not (tmp_path / "out").exists()


def test_size_that_the_network_cannot_halve_leaves_no_folder(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pt")
    odd = Given(image_size=15, timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_large")
    with pytest.raises(CheckpointError, match="must divide by 2"):
        convert(tmp_path / "plain.pt", tmp_path / "out", odd)
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_left_as_it_is(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "plain.pt", tmp_path / "out", CIFAR)
    assert (tmp_path / "out" / "note").read_text() == "mine"
