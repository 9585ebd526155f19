"""Commands that ask a server, or tell what one would, held against what a real server says."""

import json
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import RunningServer, run_cli


def printed(*command: str) -> dict[str, Any]:
    """The one JSON object that a command prints, and nothing beside it."""
    done = run_cli(*command)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_inspect_tells_of_a_folder_as_a_server_of_it_does(server: RunningServer, small: Path) -> None:
    told = printed("inspect", str(small), "--json")
    served = httpx.get(f"{server.url}/model").json()
    assert told["model"].items() <= served.items()
    of_a_server = {"device", "exact", "executor", "executor_details", "fingerprint", "limits", "precision"}
    assert served.keys() - told["model"].keys() == of_a_server
    assert (told["format"], told["missing"], told["taken"]) == ("a folder of diffusers", [], [])
    assert told["costs"]["weights_bytes"] == 4 * served["num_parameters"]
    assert told["costs"]["passes"] == 2 * served["recommended"]["steps"], "dpmpp_2m, guided"


def test_models_prints_what_a_server_lists(server: RunningServer) -> None:
    assert printed("models", "--url", server.url, "--json") == httpx.get(f"{server.url}/models").json()


def test_a_bench_counts_as_the_metrics_of_the_server_do(server: RunningServer) -> None:
    images, refused = server.metric("tminus_images_total"), server.metric("tminus_rejected_total")
    load = ("--rate", "20", "--seconds", "1", "-n", "2", "--steps", "2", "--sampler", "ddim")
    figures = printed("bench", server.url, *load, "--json")
    assert (figures["requests"], figures["answered"], figures["refused"]) == (20, 20, {})
    assert (figures["sampler"], figures["steps"]) == ("ddim", 2)
    assert server.metric("tminus_images_total") - images == 2 * 21, "with the one that warms up"
    assert server.metric("tminus_rejected_total") == refused
    assert 0 < figures["latency_s"]["p50"] <= figures["latency_s"]["p95"] <= figures["latency_s"]["p99"]
