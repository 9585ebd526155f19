from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.service.conftest import Around, MakeCheckpoint
from tests.service.fakes import INFO, FakeEngine
from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.service.engine import openvino_executor
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor
from tminus.service.engine.selftest import same_alone_and_together

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def make_engine(checkpoint: Checkpoint, executor: Executor) -> Engine:
    return Engine(checkpoint, executor, CPU, max_rows=64, max_jobs=16)


class Mixing(Around):
    """An executor whose output depends, ever so little, on what else is in the batch."""

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return super().__call__(x, t, class_labels) + 1e-7 * x.mean()


class ByPosition(Around):
    """An executor that treats the last place of a pass otherwise, as a vector unit's tail may."""

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        out = super().__call__(x, t, class_labels)
        if len(out) > 1:
            out[-1] *= 1 + 2e-7
        return out


PLAIN: dict[str, object] = {}
OTHERS: tuple[dict[str, object], ...] = (
    {"classes": False},
    {"noise": NoiseConfig(num_train_timesteps=2)},
    {"out_channels": 2, "noise": NoiseConfig(num_train_timesteps=20, variance_type="learned_range")},
    {"noise": NoiseConfig(num_train_timesteps=20, rescale_betas_zero_snr=True, prediction_type="v_prediction")},
)


@pytest.mark.parametrize(
    ("fields", "max_batch"), [*((PLAIN, places) for places in (2, 4, 7, 64)), *zip(OTHERS, (4, 7, 64, 16), strict=True)]
)
def test_a_good_engine_passes_and_is_left_empty(
    make_checkpoint: MakeCheckpoint, fields: dict[str, object], max_batch: int
) -> None:
    checkpoint = make_checkpoint(**fields)
    engine = make_engine(checkpoint, EagerExecutor(checkpoint.net, CPU, sizes=(1,)))
    assert same_alone_and_together(engine, max_batch)
    assert sorted(engine._free_rows) == list(range(64))


@pytest.mark.skipif(not openvino_executor.available(), reason="openvino, an extra, is not installed")
def test_openvino_passes(tiny: Checkpoint) -> None:
    graph = openvino_executor.Graph(tiny.net, (1, 8, 8), 50)
    assert same_alone_and_together(
        make_engine(tiny, openvino_executor.OpenVINOExecutor(graph, sizes=(1, 2, 4), streams=2)), 16
    )


@pytest.mark.parametrize("kind", [Mixing, ByPosition])
@pytest.mark.parametrize(("fields", "max_batch"), [(PLAIN, 4), (PLAIN, 16), *zip(OTHERS, (16, 4, 16, 4), strict=True)])
def test_an_executor_whose_output_depends_on_its_neighbours_fails(
    make_checkpoint: MakeCheckpoint, kind: type[Around], fields: dict[str, object], max_batch: int
) -> None:
    checkpoint = make_checkpoint(**fields)
    executor = kind(EagerExecutor(checkpoint.net, CPU, sizes=(1,)))
    assert not same_alone_and_together(make_engine(checkpoint, executor), max_batch)


def test_a_fake_engine_passes_within_its_rules() -> None:
    """The fake asserts the order of steps, and that slots are given back."""
    for info in (
        INFO,
        replace(INFO, conditional=False, class_names=(), null_class=None),
        replace(INFO, null_class=None),
    ):
        engine = FakeEngine(info, slots=40)
        assert same_alone_and_together(engine, 8)
        assert engine.jobs == {}
        assert any(len(batch.rows) > 2 for batch in engine.batches)
        assert any(batch.guided for batch in engine.batches) == (info.null_class is not None)
