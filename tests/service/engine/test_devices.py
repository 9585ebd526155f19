"""The device: which it is, when it is lost, copies to and from it, and the flags of TF32."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.engines import CPU, OnGpu, Poisoned, make_engine, spec_of
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service.engine.devices import (
    MAX_DEFAULT_ROWS,
    choose_device,
    default_max_rows,
    is_lost,
    multiplying,
    streams,
)
from tminus.service.engine.executors import EagerExecutor
from tminus.service.errors import NotFinite
from tminus.service.work import Batch


@pytest.mark.parametrize("name", ["", "gpu", "cpu:x", "mps", "cuda:4096"])
def test_a_bad_device_name_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match="device") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)


def test_the_default_number_of_rows_fits_the_latent_budget(make_checkpoint: MakeCheckpoint) -> None:
    assert default_max_rows(make_checkpoint()) == MAX_DEFAULT_ROWS
    large = make_checkpoint(in_channels=3, out_channels=3, sample_size=512)
    assert default_max_rows(large) == 512 * 2**20 // (2 * 4 * 3 * 512 * 512)
    assert default_max_rows(replace(large, size_px=(2**16, 2**16))) == 4, "the least that --max-batch may be"


@pytest.mark.parametrize("error", [None, torch.AcceleratorError("an illegal memory access was encountered", 700)])
def test_a_gpu_is_lost_when_it_cannot_even_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def synchronize(_device: torch.device) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert is_lost(torch.device("cuda")) is (error is not None)
    assert not is_lost(torch.device("cpu"))


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


CUDA = torch.device("cuda")


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def defaults() -> Iterator[tuple[bool, bool]]:
    before = flags()
    yield before
    assert flags() == before


def test_flags_are_set_inside_on_a_gpu_and_as_before_outside(defaults: tuple[bool, bool]) -> None:
    for tf32 in (False, True):
        with multiplying(CUDA, tf32=tf32):
            with multiplying(CUDA, tf32=tf32):
                pass
            assert flags() == (tf32, tf32)
        assert flags() == defaults
        with multiplying(CPU, tf32=not defaults[0]):
            assert flags() == defaults


@pytest.mark.parametrize("same", [True, False])
def test_threads_that_want_the_same_do_not_wait_for_each_other_and_others_do(same: bool) -> None:
    """One of them may be compiling, which takes a minute."""
    seen: list[tuple[bool, bool]] = []

    def other() -> None:
        with multiplying(CUDA, tf32=True):
            seen.append(flags())

    thread = threading.Thread(target=other)
    with multiplying(CUDA, tf32=same):
        thread.start()
        thread.join(10 if same else 0.2)
        assert thread.is_alive() is not same
        assert flags() == (same, same), "the first still launches"
    thread.join(10)
    assert seen == [(True, True)]
