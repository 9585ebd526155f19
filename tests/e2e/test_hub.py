"""A server, and a command, of a checkpoint that is named by its id on the hub: one of the tests' own."""

from collections.abc import Callable
from pathlib import Path

import httpx

from tests.e2e.conftest import RunningServer, run_cli, stop_server
from tests.hub import running_hub

ID = "google/ddpm-cifar10-32"


def test_a_server_of_a_hub_id_starts_again_without_the_hub(
    own_server: Callable[..., RunningServer], small: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        commit = hub.push(ID, small)
        cache = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        by_id = own_server(checkpoint=Path(f"cats={ID}@main"), **cache)
        first = by_id.post(json={"seed": 3, "steps": 2}).content
        assert f"{ID}@main is commit {commit}" in by_id.log
        stop_server(by_id)
        inspected = run_cli("inspect", f"{ID}@{commit}", **cache)
        assert inspected.returncode == 0, inspected.stderr
    again = own_server(checkpoint=Path(ID), **cache)  # the hub is gone
    assert f"commit {commit} of the cache is taken" in again.log
    assert again.post(json={"seed": 3, "steps": 2}).content == first
    refused = run_cli("sample", "--checkpoint", "google/other", **cache)
    assert refused.returncode == 1
    assert refused.stderr.startswith("tminus: google/other: no such folder, not in the hub's cache, and ")
    assert httpx.get(f"{again.url}/model").json()["name"] == "small"
