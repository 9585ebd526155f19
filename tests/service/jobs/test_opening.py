"""A start on a full disk serves all but durable jobs, and those as soon as there is room."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.conftest import MakeSite, problem
from tests.service.durable import SPEC, post, wait_for
from tests.service.fakes import make_spec
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import sqlite_file
from tminus.service.jobs.store.opening import open_store
from tminus.service.jobs.store.records import JobRecord

WEIGHTS = "ab" * 32


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {folder} 2> /dev/null"):
        pytest.skip("needs the right to mount a disk")
    yield folder
    os.system(f"umount {folder}")


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    with (folder / "filler").open("wb") as filler:
        size = 2**16
        while size:
            try:
                os.write(filler.fileno(), bytes(size))
            except OSError:
                size //= 2
    return folder / "filler"


def opens_when_there_is_room(folder: Path, make_full: Callable[[], Callable[[], None]], had_jobs: bool) -> None:
    if had_jobs:
        store = open_store(str(folder), WEIGHTS)
        store.add(JobRecord("old", make_spec(), 1))
        store.close()
    make_room = make_full()
    store = open_store(str(folder), WEIGHTS)
    with pytest.raises(StorageFailed):
        store.add(JobRecord("a", make_spec(), 2))
    make_room()
    assert store.add(JobRecord("a", make_spec(), 2))
    assert [record.id for record in store.claim().jobs] == ["old", "a"][not had_jobs :]
    store.close()


@pytest.mark.parametrize("had_jobs", [False, True])
def test_a_full_disk_does_not_stop_a_start_and_is_tried_again(small_disk: Path, had_jobs: bool) -> None:
    opens_when_there_is_room(small_disk, lambda: fill(small_disk).unlink, had_jobs)


@pytest.mark.parametrize("had_jobs", [False, True])
def test_the_same_where_the_system_says_that_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_jobs: bool
) -> None:
    """As above, for machines where no disk can be mounted."""

    def make_full() -> Callable[[], None]:
        def refuse(file: Path) -> None:
            raise sqlite_file.cannot_be_used(file, OSError(28, "No space left on device"))

        monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", refuse)
        return lambda: monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", sqlite_file.prepare)

    opens_when_there_is_room(tmp_path, make_full, had_jobs)


def test_a_server_that_starts_on_a_full_disk_takes_durable_jobs_as_soon_as_there_is_room(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> None:
        raise sqlite_file.cannot_be_used(file, OSError(28, "No space left on device"))

    monkeypatch.setattr("tminus.service.jobs.lifecycle.RETRY_S", 0.05)
    monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", refuse)
    site = make_site(state_file=lambda weights_hash: open_store(str(tmp_path), weights_hash))
    problem(site.client.post("/jobs", json=SPEC), 507, "storage_failed")
    assert site.post(json=SPEC).status_code == 200
    monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", sqlite_file.prepare)
    assert wait_for(site, post(site).json()["id"])["state"] == "done"
