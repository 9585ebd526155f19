"""Rows with a mask: what they keep, to the bit, and that the rows beside them do not notice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.service.conftest import Around, MakeCheckpoint
from tests.service.engine.edits import edit, edited_alone, half_mask, picture, states
from tests.service.engine.engines import CPU, MIXED, Job, OnGpu, make_engine, spec_of, together
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service.engine.executors import EagerExecutor
from tminus.service.spec import Inputs
from tminus.service.work import Batch, timesteps_of

pytestmark = pytest.mark.slow

# --- the same bytes ---


def test_plain_rows_beside_masked_ones_have_the_bytes_they_had(tiny: Checkpoint) -> None:
    plain: list[Job] = [(spec, None) for spec in MIXED]
    masked = [edit(Inputs(picture(k), half_mask(k)), n=2, steps=8 + k, seed=k, guidance=1.0 + k) for k in range(3)]
    found = together(make_engine(tiny), [*plain, *masked], max_batch=7)
    for job, images in zip([*plain, *masked], found, strict=True):
        np.testing.assert_array_equal(images, edited_alone(tiny, job))


def test_a_mask_that_is_all_white_is_no_mask_and_one_that_is_all_black_gives_the_image(tiny: Checkpoint) -> None:
    inputs = Inputs(picture(), np.ones((8, 8), bool))
    np.testing.assert_array_equal(edited_alone(tiny, edit(inputs, n=2)), edited_alone(tiny, (spec_of(n=2), None)))
    kept = edited_alone(tiny, edit(Inputs(picture(), np.zeros((8, 8), bool)), n=2))
    np.testing.assert_array_equal(kept, np.stack([picture()] * 2))


def test_the_noise_of_known_pixels_is_drawn_apart_from_every_other(tiny: Checkpoint) -> None:
    """At each step the known pixels are x_0 under noise of that step's own draw, whatever the strength."""
    inputs = Inputs(picture(), half_mask())
    schedule = tiny.noise.schedule()
    for strength in (None, 0.5):
        job = edit(inputs, steps=10, strength=strength, seed=8)
        timesteps, start = timesteps_of(job[0], make_engine(tiny).info), job[0].start
        x_0 = inputs.image.transpose(2, 0, 1) / 127.5 - 1
        for i, x in enumerate(states(tiny, job)[1:]):
            abar = float(schedule.alpha_bar[timesteps[i + 1]]) if i + 1 < len(timesteps) else 1.0
            eps = image_noise(8, [0], 2**31 + start + i, (1, 8, 8), CPU)[0].numpy()
            expected = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
            np.testing.assert_allclose(x[0][:, :, 4:], expected[:, :, 4:], atol=1e-6)


def test_known_pixels_are_exact_where_ddim_ends_short_of_x_0(make_checkpoint: MakeCheckpoint, tiny: Checkpoint) -> None:
    checkpoint = make_checkpoint(noise=replace(tiny.noise, set_alpha_to_one=False))
    image, mask = picture(), half_mask()
    found = edited_alone(checkpoint, edit(Inputs(image, mask), sampler="ddim"))
    np.testing.assert_array_equal(found[0][~mask], image[~mask])


def test_colour_is_kept_in_all_its_channels(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(in_channels=3, out_channels=3, sample_size=(4, 10))
    image, mask = picture(3, (4, 10, 3)), np.eye(4, 10, dtype=bool)
    found = edited_alone(checkpoint, edit(Inputs(image, mask), n=2, steps=5, strength=0.7))
    np.testing.assert_array_equal(found[:, ~mask], np.stack([image[~mask]] * 2))
    assert (found[:, mask] != image[mask]).any()


# --- slots ---


def test_a_slots_former_mask_leaves_no_trace(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=2, max_jobs=1)
    for job in [
        edit(Inputs(picture(), half_mask()), n=2),
        (spec_of(n=2), None),
        edit(Inputs(picture(1), half_mask(3)), n=2),
    ]:
        np.testing.assert_array_equal(together(engine, [job], max_batch=7)[0], edited_alone(tiny, job))


def test_a_row_that_turns_nan_under_its_mask_breaks_its_own_job_only(tiny: Checkpoint) -> None:
    class Sick(Around):
        def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            out = self.executor(x, t, class_labels)
            assert class_labels is not None
            return torch.where((class_labels == 2)[:, None, None, None], torch.nan, out)

    engine = make_engine(tiny, executor=Sick(EagerExecutor(tiny.net, CPU)))
    sick, well = edit(Inputs(picture(), half_mask()), class_labels=(2,)), edit(Inputs(picture(), half_mask()), seed=3)
    rows = [engine.add(spec, inputs=inputs) for spec, inputs in (sick, well)]
    engine.step(Batch((*rows[0], *rows[1]), (0, 0), ()))
    assert engine.broken((*rows[0], *rows[1])) == rows[0]


# --- on a GPU ---


@pytest.mark.gpu
def test_edits_on_a_gpu_are_those_of_the_cpu_and_a_tick_does_not_wait(
    tiny: Checkpoint,
    on_gpu: OnGpu,
) -> None:
    checkpoint, device = on_gpu()
    jobs = [
        edit(Inputs(picture(k), half_mask(k)), n=2, steps=8 + k, seed=k, strength=s) for k, s in enumerate((None, 0.5))
    ]
    for job, images in zip(jobs, together(make_engine(checkpoint, device=device), jobs, max_batch=7), strict=True):
        np.testing.assert_allclose(images.astype(int), edited_alone(tiny, job).astype(int), atol=1)
    engine = make_engine(checkpoint, device=device)
    (spec, inputs), warm = jobs[0], 2
    rows = engine.add(spec, inputs=inputs)
    for step in range(warm):
        engine.step(Batch(rows, (step, step), ()))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(Batch(rows, (warm, warm), ()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
