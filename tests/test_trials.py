"""The trials of tests/trials, small: each must pass."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.e2e.conftest import _cache_of_our_own, serving, shared_folder, small  # noqa: F401
from tests.e2e.restarting import ForkedServer, make_specs
from tests.tools import needs
from tests.trials import checkpoints, churn, connections, faults, overload, rolling, soak, websockets
from tests.trials.claims import Claim

QUICK_START = (
    *("--executor", "eager", "--threads", "1"),
    *("--max-batch", "16", "--result-cache-mb", "0"),
)


@pytest.fixture(autouse=True)
def _no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process of the tests, where a trial is in a child of its own."""
    monkeypatch.setattr(checkpoints.signal, "alarm", lambda _seconds: 0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("safe", "pickled"):
        checkpoints.make(folder / name, safe=name == "safe")
    return [folder / "safe", folder / "pickled"]


@pytest.mark.long
def test_no_damaged_folder_does_anything_but_be_refused_or_be_a_checkpoint(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HANG_S", 60)
    outcomes = [checkpoints.attempt(number, 0, sources, tmp_path) for number in range(60)]
    assert {outcome for outcome, _ in outcomes} == {"refused", "loaded"}, outcomes
    assert len({done for _, done in outcomes}) > 20


@pytest.mark.long
def test_no_hostile_dialogue_leaves_anything_behind() -> None:
    counts, wrong = websockets.trial(100, 3)
    assert wrong == []
    assert counts["dialogues"] == 100
    assert counts["HTTP 101"] > 50
    assert counts.keys() >= {"malformed_message", "unauthorized", "malformed_request"}


def missed(claims: list[Claim], *but: str) -> list[Claim]:
    """Those that do not hold, without those that hold a machine to a time."""
    return [claim for claim in claims if not claim.holds and not any(word in claim.what for word in but)]


# --- soak ---


@pytest.mark.long
def test_a_mix_of_all_clients_gets_what_it_should(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(soak, "WARM_UP_S", 0.5)
    monkeypatch.setattr(soak, "CLIENTS", 8)
    with serving(small, *QUICK_START, "--max-streams-per-address", "4096") as server:
        claims = asyncio.run(soak.trial(server.url, minutes=0.1, load=0.3, seed=1, peak_s=2))
    assert missed(claims, "peak", "latency", "memory") == []


# --- overload ---


@pytest.mark.long
def test_a_short_flood_is_refused_as_it_should(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tests.trials.overload.WARM_UP_S", 0.5)
    with serving(small, *QUICK_START, *overload.FLAGS) as server:
        claims = asyncio.run(overload.trial(server.url, seconds=4, load=3, seed=1, peak_s=1, herd=20))
    of_a_quiet_machine = ("Retry-After not within", "refusals under the limit", "goodput", "until", "newcomer", "ideal")
    assert missed(claims, *of_a_quiet_machine) == []


# --- connections ---


def shorten() -> None:
    """In the server's process: what is waited for ten seconds is waited for one."""
    from tminus.service.api import stream
    from tminus.service.api.edge import http_protocol, middleware

    http_protocol.HEAD_S = middleware.WINDOW_S = stream.FIRST_MESSAGE_S = 1.0


@pytest.mark.long
def test_connections_that_are_held_keep_nobody_out(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(connections, "PER_ADDRESS", 20)
    flags = ("--max-connections-per-address", "64", *connections.flags_for(200))
    with serving(small, *QUICK_START, *flags, prepare=shorten) as server:
        claims = asyncio.run(connections.trial(server.url, 200, 2, slow=20))
        claims += asyncio.run(connections.readers_trial(server.url, 2, readers=20))
        claims += asyncio.run(connections.floods(server.url, 0.2))
    assert missed(claims, "median", "open at once", "GET /healthz") == []


# --- clients who leave ---


@pytest.mark.long
def test_connections_dropped_at_random_points_leave_no_row_task_or_file(small: Path) -> None:  # noqa: F811
    with serving(small, *QUICK_START, "--max-streams-per-address", "4096") as server:
        claims = asyncio.run(churn.trial(server.url, 40, 20))
    assert missed(claims, churn.MEMORY) == []


# --- faults ---


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["clock", "death", "hang", "disk", "worker", "step", "memory-job", "memory-limit"]
)  # others: tests/e2e
def test_a_fault_has_the_outcome_that_is_stated(
    small: Path,  # noqa: F811
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "clock":
        needs("libfaketime")
    if name == "disk" and os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    halved = [spec | {"steps": spec["steps"] // 2} for spec in make_specs(20)]
    monkeypatch.setattr(faults, "make_specs", lambda count: halved[:count])
    assert missed(faults.trial(small, [name], QUICK_START)) == []


# --- restarts ---


@pytest.mark.long
def test_no_request_fails_while_two_servers_are_restarted_in_turn(
    small: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rolling, "Server", ForkedServer)
    assert missed(rolling.trial(small, rounds=1, flags=QUICK_START)) == []
