"""Sampling without a server: one job on the same engine and scheduler, in this process."""

from collections.abc import Callable, Sequence

from tminus.service.engine.protocol import RowEngine
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import Images, Inputs, SampleSpec
from tminus.service.work import work_of

# Is given the engine, the job's rows, and those that have stepped, by the steps they have taken and their index.
Record = Callable[[RowEngine, Sequence[int], Sequence[tuple[int, int]]], object]


def sample_locally(
    engine: RowEngine,
    spec: SampleSpec,
    max_batch: int,
    on_rows: Callable[[int], object],
    inputs: Inputs | None = None,
    record: Record | None = None,
) -> Images:
    """Run one job to its end; on_rows is called after each tick with the number of rows in it.

    record: is called before the first tick with all rows, and after each with those in it. Raises ValueError as
    Engine.add does, and NotFinite.
    """
    scheduler = Scheduler(Sharing.of(max_batch))
    rows = engine.add(spec, inputs=inputs)
    scheduler.add("local", rows, work_of(spec, engine.info))
    if record is not None:
        record(engine, rows, [(0, index) for index in range(spec.n)])
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        if record is not None:
            record(engine, rows, [(step + 1 - spec.start, index) for step, index in batch.jobs[0].steps])
        scheduler.advance(batch)
        on_rows(len(batch.rows))
    images = engine.images(rows)()
    engine.remove(rows)
    return images
