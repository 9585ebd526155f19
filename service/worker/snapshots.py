"""Snapshots of the durable jobs of a model, as often as its keeper wants them. Called in the worker's thread."""

import logging
from collections.abc import Callable, Iterable

from tminus.service.worker.loaded_models import LoadedModel
from tminus.service.worker.running_job import RunningJob

log = logging.getLogger(__name__)


def take_snapshots(model: LoadedModel, jobs: Iterable[RunningJob], clock: Callable[[], float]) -> None:
    """Hand a model's keeper snapshots of those jobs that are durable, and have stepped since their last one."""
    durable = [job for job in jobs if job.new.durable and job.model.number == model.number]
    moved = [job for job in durable if job.steps_taken > job.steps_kept]
    if model.keeper is None or not moved:
        return
    began_s = clock()
    try:
        snapshots = {job.id: model.engine.snapshot(job.rows, job.model.scheduler.steps(job.id)) for job in moved}
    except Exception:  # a snapshot is not worth the jobs
        log.exception("no snapshot could be taken")
        return
    for job in moved:
        job.steps_kept = job.steps_taken
    model.keeper.keep(snapshots, began_s, clock() - began_s)
