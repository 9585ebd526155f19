"""Durable jobs as their clients see them: posted, looked up, waited for, and followed by their events."""

import json
from typing import Any

from tests.service.conftest import Site
from tests.service.fakes import wait_until

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
