import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import INSTANT, MakeSite, Site
from tests.service.fakes import INFO, LIMITS, wait_until

SPEC = {"n": 2, "steps": 6, "seed": 5, "class_label": "cat", "guidance": 2}


def post(site: Site, spec: dict[str, Any] = SPEC, **headers: str) -> Any:
    response = site.client.post("/jobs", json=spec, headers=headers)
    assert response.status_code == 202, response.text
    return response


def state(site: Site, job_id: str) -> str:
    found: str = site.client.get(f"/jobs/{job_id}").json()["state"]
    return found


def wait_for(site: Site, job_id: str, wanted: str = "done") -> dict[str, Any]:
    wait_until(lambda: state(site, job_id) == wanted)
    document: dict[str, Any] = site.client.get(f"/jobs/{job_id}").json()
    return document


def events(text: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """Read name, data and id of each event."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"]), fields.get("id")))
    return found


def wait_for_viewer(site: Site) -> None:
    """Wait until a client follows a job; the worker knows of it before its next tick."""
    wait_until(lambda: site.streams._open.total() == 1)


@pytest.fixture
def held(make_site: MakeSite) -> Site:
    """A site that is ready, and whose next tick waits for the test."""
    site = make_site()
    site.engine.gate.shut()
    return site


class Restarts:
    """Sites on one file, one after the other. The last is shut down at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.site = file, None

    def start(
        self,
        *,
        shut: bool = False,
        info: dict[str, Any] | None = None,
        tick_times: tuple[tuple[int, float], ...] = INSTANT,
        **fields: Any,
    ) -> Site:
        limits = replace(LIMITS, **fields)
        self.site = Site(replace(INFO, **info or {}), limits, tick_times, state_file=self.file)
        if shut:
            self.site.engine.gate.shut()
            self.site.engine.gate.let()  # the warm-up
        self.site.client.__enter__()
        self.site.wait_until_ready()
        return self.site

    def stop(self) -> None:
        """Stop as SIGTERM does, without waiting: accepted jobs stay."""
        if self.site is not None:
            self.site.worker.drain()
            self.site.engine.gate.open()
            self.site.client.__exit__(None, None, None)
            assert self.site.engine.jobs == {}
            self.site = None


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(tmp_path / "jobs.sqlite3")
    yield made
    made.stop()
