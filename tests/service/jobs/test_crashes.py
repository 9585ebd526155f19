import logging

import pytest

from tests.service.conftest import Restarts
from tests.service.durable import post, wait_for
from tests.service.jobs.conftest import FileShelf
from tests.service.jobs.kept import job
from tminus.service.jobs.crashes import count_ends, tell_ends
from tminus.service.jobs.process_end import End
from tminus.service.jobs.store.sqlite_store import SqliteStore

SIGNAL = "Segmentation fault"


def test_an_end_counts_against_what_was_worked_on_and_being_killed_from_outside_does_not(
    file: FileShelf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = file.open()
    for name in "abc":
        store.add(job(name))
    killed = [End(None, frozenset("a"))] * 50
    ends = [*killed, End(SIGNAL, frozenset("bc"), "  File x"), End(SIGNAL, frozenset())]
    tell_ends(ends)
    count_ends(ends, store)
    assert [record.crashes for record in store.claim()] == [0, 1, 1]
    assert "killed, or the machine went, as it worked on a\n" in caplog.text
    assert f"{SIGNAL}. It worked on b, c\n  File x\n" in caplog.text
    assert f"{SIGNAL}. It worked on no job\n" in caplog.text


def test_a_job_that_ended_the_server_twice_fails_and_one_that_did_once_shares_no_tick(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    twice, once, never = (post(site, {"steps": 20, "seed": seed}).json()["id"] for seed in range(3))
    restarts.stop()
    store = SqliteStore(restarts.file)
    for ids in ([twice], [twice], [once]):
        store.crashed(ids)
    store.close()
    site = restarts.start()
    assert wait_for(site, twice, "failed")["problem"]["code"] == "engine_failed"
    for job_id in (once, never):
        assert wait_for(site, job_id)["state"] == "done"
    assert {len(batch.rows) for batch in site.engine.batches} == {1}
