"""A start on a full disk serves all but durable jobs, and those as soon as there is room."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.conftest import MakeSite, problem
from tests.service.durable import SPEC, post, wait_for
from tests.service.jobs.kept import job
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import sqlite_file
from tminus.service.jobs.store.sqlite_store import open_store

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


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As of a full disk, for machines where none can be mounted. Called, it makes room."""

    def refuse(file: Path) -> None:
        raise sqlite_file.cannot_be_used(file, OSError(28, "No space left on device"))

    monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", refuse)
    return lambda: monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", sqlite_file.prepare)


@pytest.mark.parametrize("had_jobs", [False, True])
def test_a_full_disk_does_not_stop_a_start_and_is_tried_again(small_disk: Path, had_jobs: bool) -> None:
    if had_jobs:
        store = open_store(str(small_disk), WEIGHTS)
        store.add(job("old"))
        store.close()
    filler = fill(small_disk)
    store = open_store(str(small_disk), WEIGHTS)
    with pytest.raises(StorageFailed):
        store.add(job("a"))
    filler.unlink()
    assert store.add(job("a"))
    assert [record.id for record in store.claim().jobs] == ["old", "a"][not had_jobs :]
    store.close()


def test_a_server_that_starts_on_a_full_disk_takes_durable_jobs_as_soon_as_there_is_room(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[[], None]
) -> None:
    monkeypatch.setattr("tminus.service.jobs.lifecycle.RETRY_S", 0.05)
    site = make_site(state_file=lambda weights_hash: open_store(str(tmp_path), weights_hash))
    problem(site.client.post("/jobs", json=SPEC), 507, "storage_failed")
    assert site.post(json=SPEC).status_code == 200
    full()
    assert wait_for(site, post(site).json()["id"])["state"] == "done"
