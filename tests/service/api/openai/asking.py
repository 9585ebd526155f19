"""How the tests ask for images below /v1."""

from typing import Any

from tests.service.conftest import Site
from tests.service.fakes import INFO

SIZE = f"{INFO.width_px}x{INFO.height_px}"
CAT: dict[str, Any] = {"prompt": "cat", "steps": 4, "sampler": "ddpm", "guidance": 1, "seed": 5}
SAME: dict[str, Any] = {"class_label": "cat", "steps": 4, "sampler": "ddpm", "seed": 5}  # what POST /sample calls it


def generate(site: Site, **members: Any) -> Any:
    return site.client.post("/v1/images/generations", json=members)


def edit(site: Site, files: dict[str, bytes], **fields: Any) -> Any:
    named = {name: (f"{name}.png", data, "image/png") for name, data in files.items()}
    return site.client.post("/v1/images/edits", files=named, data={name: str(value) for name, value in fields.items()})


def error_of(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Check what every error has, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == code
    return error
