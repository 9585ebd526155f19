from collections.abc import Iterator

import pytest

from tests.service.worker.bench import Bench, MakeBench


@pytest.fixture
def make_bench() -> Iterator[MakeBench]:
    """Makes benches; at the end of the test each is closed, and must hold nothing."""
    benches: list[Bench] = []

    def make(**kwargs: object) -> Bench:
        benches.append(Bench(**kwargs))  # type: ignore[arg-type]
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()
