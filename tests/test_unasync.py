"""The sync half of the client is what tests/unasync.py makes of the async half."""

import inspect
import re
from typing import Any

import pytest

from tests.unasync import ASYNC, RULES, SYNC, generated, sync_of
from tminus.service.client import AsyncClient, AsyncJob, AsyncWatching, Client, Job, Watching


def test_the_sync_half_is_up_to_date_and_nothing_in_it_is_async() -> None:
    assert SYNC.read_text("utf-8") == generated(), "run `make client`"
    assert not re.search(r"async|await", generated().split("\n", 1)[1], re.IGNORECASE)
    assert [rule for rule in RULES if not re.search(r"\b" + rule, ASYNC.read_text("utf-8"))] == [], "no rule is idle"


def test_code_and_docstrings_are_changed_in_whole_words() -> None:
    assert sync_of("async with AsyncThing() as x: await x.aclose()") == "with Thing() as x: x.close()"
    assert sync_of("from any task, multitask, the AsyncJob") == "from any thread, multitask, the Job"
    assert sync_of("self.area, cascade, unawaited") == "self.area, cascade, unawaited"


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Job, AsyncJob), (Watching, AsyncWatching)])
def test_the_two_clients_have_the_same_documented_calls(one: type, other: type) -> None:
    def shape(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        assert all(value.__doc__ for value in (kind, *public.values()))
        signatures = {name: inspect.signature(value).parameters.values() for name, value in public.items()}
        return {name: [(p.name, p.kind, p.default) for p in each] for name, each in signatures.items()}

    assert shape(one) == shape(other) != {}
