"""Approves bfloat16 for a checkpoint by comparing its images with images made in float32.

The criterion is in model/evaluation/precision.py. An approval is written to the checkpoint's tminus.json. If that file
is not writable, or if bfloat16 is refused, the verdict goes to the cache folder. It then applies only to these weights
on this machine.
"""

import logging
import time
from collections.abc import Generator, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tminus.model.checkpoint import Checkpoint, approve, load_checkpoint, relative_error_of
from tminus.model.evaluation.precision import MAX_IMAGES, MIN_IMAGES, Comparison, check_comparable
from tminus.service.engine import openvino_executor
from tminus.service.engine.accuracy import Deviation, deviation
from tminus.service.engine.autotune import (
    EXECUTORS,
    Builder,
    Choice,
    Wish,
    compared_inputs,
    example_inputs,
    find_candidates,
    rows_of,
)
from tminus.service.engine.choice_cache import ChoiceCache
from tminus.service.engine.executors import Executor
from tminus.service.engine.protocol import LoadOptions
from tminus.service.threads import LOADING, begin_in_daemon_thread

log = logging.getLogger(__name__)

LOWER = "bfloat16"
BUDGET_S = 600.0  # time for all passes; limits the number of images
POLL_S = 0.05  # seconds between polls while the executor is built
WORTH = 1.2  # bfloat16 is recommended only if it is faster than float32 by more than this factor
REPORTS, REPORTED_S = 10, 60.0  # number of progress lines to log, if the approval takes longer than REPORTED_S


def approve_portions(
    folder: Path,
    exact: Executor,
    device: torch.device,
    threads: int,
    cache: Path | None,
    *,
    num_images: int | None = None,
    batch_size: int = MAX_IMAGES,
) -> Generator[None, None, bool]:
    """Approve or refuse bfloat16 for this type of executor. Yields between passes; returns True if approved.

    exact: an executor of this type in float32. folder: the checkpoint's folder. The checkpoint is loaded again, because
    `exact` may have taken over the network of the first copy. num_images: None uses as many as BUDGET_S allows. Raises
    ValueError if the processor lacks bfloat16 or the checkpoint cannot be judged, and OSError if an approval cannot be
    saved.
    """

    def build() -> tuple[Checkpoint, Executor]:
        checkpoint = load_checkpoint(folder)
        size = 1 if device.type == "cpu" else batch_size
        streams = 1 if batch_size == 1 else None  # for single rows, one stream uses all threads
        builder = Builder(checkpoint, device, threads, cache)
        return checkpoint, builder.build(Choice(exact.name, LOWER, sizes=(size,), streams=streams))

    building = begin_in_daemon_thread(build, LOADING)
    while not building.done():
        wait([building], POLL_S)
        yield
    checkpoint, lower = building.result()
    comparison = Comparison(checkpoint)
    place_s = []
    for forward in (exact, lower):
        rows = min(batch_size, threads)
        inputs = example_inputs(checkpoint, device, rows)
        for _ in range(2):  # the first run warms up
            began_s = time.perf_counter()
            forward(*inputs).cpu()
            yield
        place_s.append((time.perf_counter() - began_s) / rows)
    passes = comparison.passes
    image_s = comparison.places * (passes[0] * place_s[0] + passes[1] * place_s[1])
    num_images = num_images or min(max(int(BUDGET_S / image_s), MIN_IMAGES), MAX_IMAGES)
    samples = f"{num_images} images by {' and by '.join(map(str, comparison.points))}"
    log.info(
        "comparing %s in %s with float32: %s, %d passes, %s",
        exact.name, LOWER, samples, num_images * sum(passes), _duration(num_images * image_s),
    )  # fmt: skip
    total, told = -(-num_images // batch_size) * sum(passes), 0
    for done, _ in enumerate(comparison.run(exact, lower, device, num_images, batch_size), 1):
        yield
        if told < done * REPORTS // total < REPORTS and num_images * image_s > REPORTED_S:
            told = done * REPORTS // total
            left_s = num_images * image_s * (total - done) / total
            log.info("%d %% of the passes are done, %s are left", 100 * done // total, _duration(left_s))
    for difference in comparison.differences:
        log.info("%s", difference)
    check = {
        "executor": exact.name,
        "precision": LOWER,
        "weights_hash": checkpoint.weights_hash,
        "samples": samples,
        "criterion": "truncation",
        "differences": [asdict(difference) for difference in comparison.differences],
    }
    check |= asdict((yield from _deviation(checkpoint, device, exact, lower)))
    kept = kept_verdict(checkpoint, device, exact.name, cache)
    if not comparison.ok:
        log.info("%s is not approved: its images differ by more than the truncation of a sampler excuses", LOWER)
        kept.write({"approved": False} | check)
        if (exact.name, LOWER) in checkpoint.approved:
            log.warning("an earlier approval in %s stays: who wants float32 deletes it there", folder)
        return False
    try:
        approve(folder, check)
        log.info("%s is approved for %s, in %s: a server that starts now may use it", LOWER, exact.name, folder)
    except OSError as error:
        kept.write({"approved": True} | check)
        if (kept.read() or {}).get("approved") is not True:
            raise
        log.info(
            "%s is approved for %s, by servers with this cache folder, in %s, as the checkpoint cannot be written: %s",
            LOWER, exact.name, kept.file, error,
        )  # fmt: skip
    return True


def _deviation(
    checkpoint: Checkpoint, device: torch.device, exact: Executor, lower: Executor
) -> Generator[None, None, Deviation]:
    """Compare the outputs of both executors. `Verdict` derives its error bound from the result."""
    inputs = compared_inputs(checkpoint, device)
    outputs: dict[Executor, list[torch.Tensor]] = {exact: [], lower: []}
    for forward, outs in outputs.items():
        for place in range(len(inputs[0])):
            outs.append(forward(*rows_of(inputs, place, place + 1)).cpu())
            yield
    return deviation(torch.cat(outputs[lower]), torch.cat(outputs[exact]))


def approve_later(
    checkpoint: Checkpoint,
    executor: Executor,
    device: torch.device,
    wish: Wish,
    options: LoadOptions,
    cache: Path | None,
) -> Iterator[None]:
    """Return an iterator that approves or refuses bfloat16 while no job runs.

    The iterator is empty if a verdict is known or the options do not ask for one. If no verdict is known and bfloat16
    would be faster with OpenVINO, log how to approve it.
    """
    known = (executor.name, LOWER) in checkpoint.approved
    if known or wish.precision != "auto" or executor.precision != "float32":
        return iter(())
    if kept_verdict(checkpoint, device, executor.name, cache).read() is not None:
        return iter(())
    with suppress(ValueError):
        check_comparable(checkpoint)
        check_able(checkpoint, device, executor.name)
        if options.approve_when_idle:
            return approve_portions(options.checkpoint, executor, device, wish.threads, cache, batch_size=1)
        told = executor.name == "openvino" and log.isEnabledFor(logging.INFO)
        if told and (gain := openvino_executor.bfloat16_gain()) > WORTH:
            log.info(
                "%s would be about %.1f times as fast, and is not approved for these weights: `tminus approve %s`, or "
                "--approve-when-idle, finds out whether it does harm", LOWER, gain, options.checkpoint,
            )  # fmt: skip
    return iter(())


def check_able(checkpoint: Checkpoint, device: torch.device, executor: str) -> None:
    """Raise ValueError if this executor cannot compute in bfloat16 on this device."""
    find_candidates(checkpoint, device, Wish(executor, LOWER))


def kept_verdict(checkpoint: Checkpoint, device: torch.device, executor: str, cache: Path | None) -> ChoiceCache:
    """Return the cache entry for this machine's verdict on bfloat16 with this checkpoint and executor."""
    about = {"approve": LOWER, "executor": executor, "weights_hash": checkpoint.weights_hash}
    return ChoiceCache(cache, checkpoint, device, about, ())


def with_kept_approvals(checkpoint: Checkpoint, device: torch.device, cache: Path | None) -> Checkpoint:
    """Return a copy of the checkpoint that includes the approvals in the cache folder."""
    verdicts = {name: kept_verdict(checkpoint, device, name, cache).read() or {} for name in EXECUTORS}
    kept = {
        (name, LOWER): relative_error_of(verdict)
        for name, verdict in verdicts.items()
        if verdict.get("approved") is True
    }
    return replace(checkpoint, approved=kept | dict(checkpoint.approved))


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {max(1, round(seconds))} seconds"
