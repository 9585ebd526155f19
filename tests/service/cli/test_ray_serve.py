"""`tminus ray serve` without a cluster: what is wrong ends in one line, and what was started is ended."""

import builtins
import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.service.cli import running
from tests.service.cli.running import refusal
from tminus.service.cli import serve
from tminus.service.cli.serve import QUIET_AND_WHOLE
from tminus.service.ray_serve.replica import ending_s
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


RAY_SERVE = ("ray", "serve")


def test_settings_that_cannot_be_served_are_refused_by_name(tmp_path: Any) -> None:
    line = refusal(*RAY_SERVE, "--max-replicas", "2")
    assert "--max-replicas (TMINUS_MAX_REPLICAS)" in line
    assert "--job-store (TMINUS_JOB_STORE)" in line
    assert "--host (TMINUS_HOST)" in refusal(*RAY_SERVE, "--host", "0.0.0.0"), (
        "other machines are not let in without keys"
    )
    assert "--models (TMINUS_MODELS)" in refusal(*RAY_SERVE, "--models", str(tmp_path))


def test_without_the_extra_the_command_says_which_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    assert "pip install '.[ray]' in a checkout" in refusal(*RAY_SERVE)


def test_a_cluster_that_is_not_there_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: Any) -> None:
        assert (given["address"], given["include_dashboard"]) == ("10.0.0.5:6379", False)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("ray.init", init)
    line = refusal(*RAY_SERVE, "--ray-address", "10.0.0.5:6379")
    assert "--ray-address" in line
    assert "nobody answers" in line


class FakeServe:
    """Serve, whose applications take `takes_s` of a clock of its own to end."""

    root_url = "http://10.0.0.5:8123"

    def __init__(self, takes_s: float) -> None:
        self.now_s, self._takes_s = 0.0, takes_s
        self._gone_s: float | None = None
        self.running = False
        self.deleted: list[tuple[str, bool]] = []

    def run(self, _app: object, name: str) -> None:
        assert name == "tminus"
        self.running = True

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.deleted.append((name, _blocking))
        self._gone_s = self.now_s + self._takes_s

    def status(self) -> SimpleNamespace:
        there = self.running and (self._gone_s is None or self.now_s < self._gone_s)
        return SimpleNamespace(applications={"tminus": SimpleNamespace(deployments={})} if there else {})

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def fake_serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], FakeServe]:
    def make(takes_s: float) -> FakeServe:
        fake = FakeServe(takes_s)

        def init(**_given: Any) -> None:
            signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(signum))  # as Ray does

        monkeypatch.setattr("ray.init", init)
        monkeypatch.setattr("ray.shutdown", lambda: None)
        monkeypatch.setattr("ray.util.list_named_actors", lambda **_given: [{"name": serve.CONTROLLER}])
        monkeypatch.setattr("ray.serve.start", lambda **_given: None)
        monkeypatch.setattr("ray.serve.context._get_global_client", lambda: fake)
        monkeypatch.setattr("tminus.service.ray_serve.app.app", lambda _settings: None)
        for name in ("run", "delete", "status"):
            monkeypatch.setattr(f"ray.serve.{name}", getattr(fake, name))
        monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=lambda: fake.now_s, sleep=fake.sleep))
        monkeypatch.setattr(serve, "POLL_INTERVAL_S", 0.01)
        return fake

    return make


def stop_once_it_runs(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM when the command looks whether the application is there."""

    def status() -> SimpleNamespace:
        if not fake.deleted:
            signal.raise_signal(signal.SIGTERM)
        return fake.status()

    monkeypatch.setattr("ray.serve.status", status)


def test_a_drain_may_take_longer_than_serve_itself_waits_and_the_address_is_serves_own(
    fake_serve: Callable[[float], FakeServe], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = fake_serve(100.0)
    stop_once_it_runs(fake, monkeypatch)
    monkeypatch.setattr(serve, "set_up_log", lambda *_given: None)
    caplog.set_level("INFO", "tminus")
    result = running.run(*RAY_SERVE, "--grace-s", "120", "--port", "8000")
    assert result.exit_code == 0, (result.output, result.exception)
    assert fake.deleted == [("tminus", False)]
    assert fake.now_s >= 100
    assert "listening on http://10.0.0.5:8123, with 1 to 1 replicas" in caplog.text


def test_replicas_that_do_not_end_are_told_of(
    fake_serve: Callable[[float], FakeServe], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_serve(1e9)
    stop_once_it_runs(fake, monkeypatch)
    assert "have not ended within" in refusal(*RAY_SERVE, "--grace-s", "5")
    assert fake.now_s >= ending_s(5)


@pytest.mark.parametrize("happens", ["a signal", "an error"])
def test_replicas_that_have_begun_to_start_are_ended_where_they_cannot_go_on(
    fake_serve: Callable[[float], FakeServe], monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    fake = fake_serve(5.0)

    def run(_app: object, name: str) -> None:
        fake.run(_app, name)
        if happens == "an error":
            raise RuntimeError("no room")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.serve.run", run)
    if happens == "an error":
        assert "the replicas cannot start: no room" in refusal(*RAY_SERVE)
    else:
        result = running.run(*RAY_SERVE)
        assert result.exit_code == 0, "to stop when asked is no failure"
    assert fake.deleted == [("tminus", False)]
