"""`tminus ray serve` before it starts anything: what is wrong ends in one line."""

import builtins
import signal
from collections.abc import Iterator
from typing import Any

import click.testing
import pytest

from tminus.service.cli.main import main
from tminus.service.cli.ray_serve import QUIET_AND_WHOLE, last_line
from tminus.service.ray_serve.settings import RaySettings


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*RaySettings.model_fields, "config"):
        monkeypatch.delenv(f"TMINUS_{name.upper()}", raising=False)
    for name, value in QUIET_AND_WHOLE.items():
        monkeypatch.setenv(name, value)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def refusal(*arguments: str) -> str:
    result = click.testing.CliRunner().invoke(main, ["ray", "serve", *arguments])
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "no traceback"
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("tminus: ")
    return line


def test_several_replicas_without_a_shared_store_are_refused() -> None:
    line = refusal("--max-replicas", "2")
    assert "--max-replicas (TMINUS_MAX_REPLICAS)" in line
    assert "--job-store (TMINUS_JOB_STORE)" in line


def test_other_machines_are_not_let_in_without_keys() -> None:
    assert "--host (TMINUS_HOST)" in refusal("--host", "0.0.0.0")


def test_a_folder_of_models_without_any_is_refused(tmp_path: Any) -> None:
    assert "--models (TMINUS_MODELS)" in refusal("--models", str(tmp_path))


def test_without_the_extra_the_command_says_which_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    assert "pip install 'tminus[ray]'" in refusal()


def test_a_cluster_that_is_not_there_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: Any) -> None:
        assert (given["address"], given["include_dashboard"]) == ("10.0.0.5:6379", False)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("ray.init", init)
    line = refusal("--ray-address", "10.0.0.5:6379")
    assert "--ray-address" in line
    assert "nobody answers" in line


def test_a_traceback_is_told_by_its_last_line() -> None:
    text = "It failed 3 times. Error:\n  File x\nValueError: --job-store (TMINUS_JOB_STORE): nobody answers\n\n"
    assert last_line(text) == "--job-store (TMINUS_JOB_STORE): nobody answers"
    assert last_line("torch.OutOfMemoryError: no room") == "no room"
    assert last_line("") == ""


def test_help_needs_no_ray_and_names_what_is_of_ray() -> None:
    result = click.testing.CliRunner().invoke(main, ["ray", "serve", "--help"])
    assert result.exit_code == 0
    assert "--max-replicas" in result.output
    assert "--max-batch" in result.output
