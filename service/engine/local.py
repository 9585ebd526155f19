"""Sampling without a server: one job on the same engine and scheduler, in this process."""

from collections.abc import Callable

from tminus.service.engine.protocol import RowEngine
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.scheduling.sharing import Sharing
from tminus.service.spec import Images, Inputs, SampleSpec
from tminus.service.work import work_of


def sample_locally(
    engine: RowEngine,
    spec: SampleSpec,
    max_batch: int,
    on_rows: Callable[[int], object],
    inputs: Inputs | None = None,
) -> Images:
    """Run one job to its end; on_rows is called after each tick with the number of rows in it.

    Raises ValueError as Engine.add does, and NotFinite.
    """
    scheduler = Scheduler(Sharing.of(max_batch))
    rows = engine.add(spec, inputs=inputs)
    scheduler.add("local", rows, work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        scheduler.advance(batch)
        on_rows(len(batch.rows))
    images = engine.images(rows)()
    engine.remove(rows)
    return images
