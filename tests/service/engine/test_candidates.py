"""What may be chosen: which executors and precisions, by device, approval and what is asked for."""

from dataclasses import replace

import pytest
import torch

from tests.service.engine.exact import CPU, needs_openvino
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import openvino_executor
from tminus.service.engine.autotune import Wish, choose_executor, find_candidates

CUDA = torch.device("cuda")


def candidates(checkpoint: Checkpoint, wish: Wish, device: torch.device = CPU) -> set[tuple[str, str]]:
    return {(each.executor, each.precision) for each in find_candidates(checkpoint, device, wish)}


def test_without_openvino_a_cpu_has_eager_and_that_is_told(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_executor, "openvino", None)
    assert candidates(checkpoint, Wish()) == {("eager", "float32")}
    assert "pip install 'tminus[openvino]'" in caplog.text
    caplog.clear()
    candidates(checkpoint, Wish(executor="eager"))
    assert caplog.text == "", "it was asked for"


@needs_openvino
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_takes_no_precision_that_the_checkpoint_does_not_approve(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32", "bfloat16"))
    other = "compile" if device == CUDA else "openvino"
    float32 = {("eager", "float32"), (other, "float32")}
    assert candidates(checkpoint, Wish(), device) == float32
    for executor in ("eager", other):
        approved = replace(checkpoint, approved=((executor, "bfloat16"),))
        assert candidates(approved, Wish(), device) == float32 | {(executor, "bfloat16")}, "of that executor only"
    both = replace(checkpoint, approved=(("eager", "bfloat16"), (other, "bfloat16")))
    assert candidates(both, Wish(), device) == float32 | {("eager", "bfloat16"), (other, "bfloat16")}
    unheard_of = replace(checkpoint, approved=(("eager", "int4"), ("../../etc", "bfloat16"), ("openvino", "../../etc")))
    assert candidates(unheard_of, Wish(), device) == float32


@needs_openvino
def test_a_precision_that_is_asked_for_needs_no_approval(checkpoint: Checkpoint) -> None:
    assert candidates(checkpoint, Wish(executor="eager", precision="bfloat16")) == {("eager", "bfloat16")}


@needs_openvino
def test_what_is_approved_of_one_executor_is_not_of_another(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved = replace(checkpoint, approved=(("openvino", "bfloat16"),))
    assert ("eager", "bfloat16") not in candidates(approved, Wish())
    assert candidates(approved, Wish(executor="eager")) == {("eager", "float32")}
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32",))
    assert candidates(approved, Wish()) == {("eager", "float32"), ("openvino", "float32")}, "approved is not able"


@pytest.mark.parametrize("executor", ["auto", "eager", "compile", "openvino"])
def test_tf32_is_refused_on_a_cpu(checkpoint: Checkpoint, executor: str) -> None:
    with pytest.raises(ValueError, match="precision tf32 needs a CUDA device, got cpu"):
        choose_executor(checkpoint, CPU, Wish(executor=executor, precision="tf32"), None)


def test_tf32_is_taken_on_a_gpu_where_it_is_asked_for_or_approved(checkpoint: Checkpoint) -> None:
    assert candidates(checkpoint, Wish(precision="tf32"), CUDA) == {("eager", "tf32"), ("compile", "tf32")}
    approved = replace(checkpoint, approved=(("compile", "tf32"), ("eager", "float32")))
    float32 = {("eager", "float32"), ("compile", "float32")}
    assert candidates(approved, Wish(), CUDA) == float32 | {("compile", "tf32")}
    no_use = replace(checkpoint, approved=(("eager", "tf32"), ("openvino", "tf32")))
    assert {precision for _, precision in candidates(no_use, Wish())} == {"float32"}, (
        "approved elsewhere, not for a CPU"
    )
