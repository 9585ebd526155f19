"""Models that come and go in the worker's thread."""

from dataclasses import replace

import pytest

from tests.service.fakes import INFO, FakeEngine, make_spec
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import SampleSpec
from tminus.service.work import work_of
from tminus.service.worker.loaded_models import LoadedModel, LoadedModels


def make_model(number: int, info: ModelInfo = INFO) -> LoadedModel:
    return LoadedModel(number, FakeEngine(info), Scheduler(Sharing.of(8)))


@pytest.fixture
def models() -> LoadedModels:
    return LoadedModels(lambda: 0.0)


@pytest.mark.parametrize(
    ("info", "labels"),
    [
        (INFO, (0,)),
        (replace(INFO, num_timesteps=1), (0,)),
        (replace(INFO, conditional=False, class_names=(), null_class=None), None),
    ],
)
def test_a_model_that_comes_runs_a_tick_and_frees_its_slot(
    models: LoadedModels, info: ModelInfo, labels: tuple[int, ...] | None
) -> None:
    model = make_model(0, info)
    assert isinstance(model.engine, FakeEngine)
    added: list[SampleSpec] = []
    model.engine.on_add = added.append
    models.put(model)
    assert [(batch.places, batch.steps) for batch in model.engine.batches] == [(1, (0,))]
    assert [(spec.n, spec.class_labels, spec.sampler) for spec in added] == [(1, labels, "ddpm")]
    assert model.engine.jobs == {}


def test_the_next_tick_is_of_a_model_that_has_work_and_one_without_may_go(models: LoadedModels) -> None:
    first, second = make_model(0), make_model(1)
    models.put(first)
    models.put(second)
    assert models.next() is None
    assert not models.has_ticks
    spec = make_spec()
    second.scheduler.add("a", (0,), work_of(spec, INFO, 1))
    assert models.next() is second
    models.stepped(second, 1.0)
    with pytest.raises(AssertionError):
        models.remove(1)
    models.remove(0)
    assert list(models) == [second]
