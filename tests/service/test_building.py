import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tminus.service import building
from tminus.service.access.access import Access
from tminus.service.engine import loading, memory
from tminus.service.settings import Settings


class Weights:
    """What a model takes memory by."""


def test_what_a_model_took_that_cannot_be_served_is_freed_before_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[weakref.ref[Weights]] = []
    freed: list[bool] = []

    def prepare_engine(checkpoint: Any, *_args: object, **_kwargs: object) -> Any:
        weights = Weights()
        taken.extend([weakref.ref(weights), weakref.ref(checkpoint.net)])
        raise ValueError("does not give the same bits alone and among others here")

    def release_memory() -> None:
        gc.collect()
        freed.extend(each() is None for each in taken)

    def read_models(_settings: Settings) -> list[loading.ReadModel]:
        checkpoint: Any = SimpleNamespace(weights_hash="ab" * 32, net=Weights())
        return [loading.ReadModel("a", tmp_path, checkpoint)]

    monkeypatch.setattr(building, "read_models", read_models)
    monkeypatch.setattr(loading, "prepare_engine", prepare_engine)
    monkeypatch.setattr(memory, "release_memory", release_memory)
    settings = Settings(state_dir=str(tmp_path / "state"))
    build = building.prepare(settings, ("127.0.0.1", 8000), Access(), None, with_metrics=False)
    with pytest.raises(ValueError, match="the same bits"):
        build()
    assert freed == [True, True]
