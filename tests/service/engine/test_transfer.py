"""Between host and device, through the engine: what is read is a copy, and no tick waits for the GPU."""

import numpy as np
import pytest
import torch

from tests.service.engine.engines import CPU, OnGpu, Poisoned, make_engine, spec_of
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service.engine.devices import streams
from tminus.service.engine.executors import EagerExecutor
from tminus.service.errors import NotFinite
from tminus.service.work import Batch


def test_latents_are_read_as_they_are_and_are_no_window(tiny: Checkpoint) -> None:
    engine = make_engine(tiny)
    rows = engine.add(spec_of(n=2))
    before = engine.latents(rows)
    assert (before.dtype, before.shape) == (np.float32, (2, 1, 8, 8))
    np.testing.assert_array_equal(before, image_noise(1, (0, 1), 0, (1, 8, 8), CPU).numpy())
    kept = before.copy()
    engine.step(Batch(rows, (0, 0), ()))
    np.testing.assert_array_equal(before, kept)
    assert not np.array_equal(engine.latents(rows[::-1]), before[::-1])


# --- on a GPU ---


@pytest.mark.gpu
def test_a_preview_on_a_gpu_is_that_of_the_cpu_and_does_not_wait_for_it(tiny: Checkpoint, on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    spec, shown = spec_of(n=2, sampler="ddim"), []
    for engine in (make_engine(checkpoint, device=device), make_engine(tiny)):
        rows = engine.add(spec)
        engine.step(Batch(rows, (0, 0), ()))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            read = engine.preview(rows, ("x_t", "x_0"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        shown.append(read())
    for name in ("x_t", "x_0"):
        np.testing.assert_allclose(shown[0][name].astype(int), shown[1][name].astype(int), atol=1)


@pytest.mark.gpu
def test_a_tick_on_a_gpu_does_not_wait_for_it(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    rows, guided = engine.add(spec_of(n=2)), engine.add(spec_of(n=1, guidance=2.0))
    engine.step(Batch((*rows, *guided), (0, 0, 0), (2,)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(Batch((*rows, *guided), (1, 1, 1), (2,)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpus_late_news_of_a_broken_row_is_not_told_of_the_next_row_in_its_slot(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    executor = Poisoned(EagerExecutor(checkpoint.net, device), 2, float("nan"))
    engine = make_engine(checkpoint, executor=executor, device=device, max_rows=2)

    def tick(rows: tuple[int, ...], step: int) -> tuple[int, ...]:
        engine.step(Batch(rows, (step,) * len(rows), ()))
        engine.wait()
        return engine.broken(rows)

    sick = engine.add(spec_of(n=2, steps=3, class_labels=(2, 2)))
    told = [tick(sick, step) for step in range(3)]
    assert told[-1] == sick, "one tick late"
    with pytest.raises(NotFinite):
        engine.images(sick)()
    engine.remove(sick)
    well = engine.add(spec_of(n=2, steps=3, seed=2))
    assert set(well) == set(sick)
    assert [tick(well, step) for step in range(3)] == [(), (), ()]
    assert engine.images(well)().shape == (2, 8, 8, 1)


@pytest.mark.gpu
def test_what_is_put_on_one_stream_of_a_gpu_never_lands_on_another(on_gpu: OnGpu) -> None:
    """torch gives out its 32 streams again and again."""
    _, device = on_gpu()
    taken = streams(device)
    for _ in range(40):
        torch.cuda.Stream(device)
        assert streams(device) is taken
    assert len({each.cuda_stream for each in (taken.copying, taken.decoding, taken.capturing)}) == 3
