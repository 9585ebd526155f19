"""Jobs as the stores' tests keep them."""

from dataclasses import replace

import numpy as np

from tests.service.fakes import make_spec
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, Outcome
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.scheduling.room import Intake
from tminus.service.spec import SampleSpec, Snapshot

PIXELS = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6, 1)
SPECS = [
    make_spec(),
    make_spec(
        n=3, class_labels=(0, None, 2), guidance=2.5, guidance_interval=(10, 900), seed=2**64 - 1, index=2**32 - 3
    ),
    make_spec(class_labels=None, sampler="ddim", eta=0.1 + 0.2, clip=False),
]


MANY = 1e9  # places


def claim(store: JobStore, build: str = "build") -> Claimed:
    """Hold all that may be held."""
    if isinstance(store, SqliteStore):
        return store.claim_all()
    assert isinstance(store, SharedStore)
    return store.claim(build, Intake(MANY), MANY, 64)


def job(name: str, spec: SampleSpec = SPECS[0], created_us: int = 1) -> JobRecord:
    return JobRecord(name, spec, created_us)


def ended(record: JobRecord, outcome: Outcome = "done", at_us: int = 2, **fields: object) -> JobRecord:
    return replace(record, outcome=outcome, finished_us=at_us, **fields)  # type: ignore[arg-type]


def snapshot(n: int = 2, seed: int = 0) -> Snapshot:
    x, x0 = np.random.default_rng(seed).normal(size=(2, n, 1, 4, 6)).astype(np.float32)
    registers = np.random.default_rng(seed + 1).normal(size=(n, 2, 1, 4, 6)).astype(np.float32)
    return Snapshot(tuple(range(n)), x, x0, registers)


def same(a: Snapshot | None, b: Snapshot) -> bool:
    return (
        a is not None
        and a.steps == b.steps
        and all(
            one.dtype == other.dtype and one.tobytes() == other.tobytes()
            for one, other in ((a.x, b.x), (a.x0_previous, b.x0_previous), (a.registers, b.registers))
        )
    )
