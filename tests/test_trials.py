"""The trials of tests/trials, small: each must pass, and must notice what it is there to notice."""

import asyncio
import gc
import os
import random
import warnings
from pathlib import Path

import pytest

from tests.e2e.conftest import _cache_of_our_own, shared_folder, small, start_server, stop_server  # noqa: F401
from tests.e2e.restarting import ForkedServer, make_specs
from tests.tools import needs
from tests.trials import checkpoints, connections, faults, overload, rolling, soak, websockets
from tests.trials.claims import Claim, least, most, none, report
from tests.trials.overload import Look, Refusal

QUICK_START = (
    "--executor",
    "eager",
    "--threads",
    "1",
    "--max-batch",
    "16",
    "--result-cache-mb",
    "0",
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


def test_every_way_of_damage_changes_a_folder(sources: list[Path], tmp_path: Path) -> None:
    """And none of them leaves it as it was in most cases, or nothing would be tried."""
    for number, mutate in enumerate(checkpoints.MUTATIONS):
        folder = tmp_path / str(number)
        checkpoints.shutil.copytree(sources[number % 2], folder)
        before = {path: path.read_bytes() for path in checkpoints.files_of(folder)}
        assert mutate(folder, random.Random(number))
        after = {path: path.read_bytes() for path in checkpoints.files_of(folder) if not path.is_symlink()}
        assert after != before, mutate


def test_code_that_ran_would_be_noticed(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda folder: (folder.parent / "canary").touch())
    assert checkpoints.attempt(0, 0, sources, tmp_path)[0] == "ran code"


@pytest.mark.long
def test_no_hostile_dialogue_leaves_anything_behind() -> None:
    counts, wrong = websockets.trial(100, 3)
    assert wrong == []
    assert counts["dialogues"] == 100
    assert counts["HTTP 101"] > 50
    assert counts.keys() >= {"malformed_message", "unauthorized", "malformed_request"}


# --- the table ---


def test_a_claim_that_does_not_hold_is_shown_and_ends_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    good = [none("errors", 0, 10), most("latency", 1.0, 1.1), least("goodput", 0.96, 0.95)]
    assert report(good) == 0
    for bad in (none("errors", 1), most("latency", 1.2, 1.1), least("goodput", 0.94, 0.95)):
        capsys.readouterr()
        assert report([*good, bad]) == 1
        assert "NO |" in capsys.readouterr().out


def missed(claims: list[Claim], *but: str) -> list[Claim]:
    """Those that do not hold, without those that hold a machine to a time."""
    return [claim for claim in claims if not claim.holds and not any(word in claim.what for word in but)]


# --- soak ---


@pytest.mark.long
def test_a_mix_of_all_clients_gets_what_it_should(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(soak, "WARM_UP_S", 0.5)
    monkeypatch.setattr(soak, "CLIENTS", 8)
    server = start_server(small, *QUICK_START, "--max-streams-per-address", "4096")
    try:
        claims = asyncio.run(soak.trial(server.url, minutes=0.1, load=0.3, seed=1, peak_s=2))
    finally:
        assert stop_server(server) == 0, server.log
    assert missed(claims, "peak", "latency", "memory") == []
    assert "Traceback" not in server.log


def test_a_client_that_is_cancelled_leaves_no_connection_open() -> None:
    """The peak cancels those that are on their way; a connection that is left open is a warning, and warnings fail."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def cancelled() -> None:
        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            mix = soak.Mix(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", soak.Seen())
            for number, kind in enumerate(4 * list(soak.KINDS)):
                client = asyncio.create_task(mix.come(kind, random.Random(number)))
                await asyncio.sleep(0.02)
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        asyncio.run(cancelled())
        gc.collect()
    assert [str(warning.message) for warning in seen] == []


def test_every_part_of_a_soak_is_the_same_load() -> None:
    part = soak.part_of(20, 60, seed=3)
    assert part == soak.part_of(20, 60, seed=3)
    assert len(part) == 1200
    assert {kind for _, kind, _ in part} == soak.KINDS.keys()
    assert sum(share for share, _ in soak.KINDS.values()) == pytest.approx(1)


# --- overload ---


def look(at_s: float, backlog_s: float = overload.BACKLOG_S) -> Look:
    return Look(at_s, backlog_s, 100 * at_s)  # a hundred row-steps a second


def test_there_is_room_when_what_is_over_the_limit_and_those_told_before_are_done() -> None:
    looks = [look(float(second)) for second in range(11)]
    refusals = [
        Refusal(1.0, 1.0, 2, overload.BACKLOG_S + 0.5),
        Refusal(1.5, 1.5, 3, overload.BACKLOG_S + 0.5),  # after the first one
        Refusal(3.5, 3.5, 1, overload.BACKLOG_S + 0.5),  # the first one's time has come
        Refusal(9.5, 9.5, 3, overload.BACKLOG_S + 2.0),  # until after the last look
    ]
    assert overload.right_waits(refusals, looks, job_s=1.0) == pytest.approx([0.5, 1.5, 1.5, 2.0])


@pytest.mark.parametrize(
    ("told_s", "right_s", "wrong"),
    [
        (1, 0.1, False),
        (2, 0.1, True),
        (4, 2.0, False),
        (5, 2.0, True),
        (2, 3.0, False),
        (2, 3.1, True),
        (300, 400, False),
    ],
)
def test_a_time_is_right_within_the_factor_and_a_second(told_s: int, right_s: float, wrong: bool) -> None:
    assert overload.is_wrong(Refusal(0, 0, told_s, 6.0), right_s) == wrong


def test_a_refusal_while_there_is_room_is_noticed() -> None:
    over = overload.BACKLOG_S + 0.3
    full, half = [look(0.9), look(1.1)], [look(0.9, 2.0), look(1.1, 2.0)]
    fair = Refusal(1.0, 1.0, 1, over)
    assert overload.under_the_limit([fair], full, job_s=0.4) == []
    assert overload.under_the_limit([fair], half, job_s=0.4) == [fair]
    assert len(overload.under_the_limit([Refusal(1.0, 1.0, 1, 3.0)], full, job_s=0.4)) == 1


@pytest.mark.long
def test_a_short_flood_is_refused_as_it_should(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tests.trials.overload.WARM_UP_S", 0.5)
    server = start_server(small, *QUICK_START, *overload.FLAGS)
    try:
        claims = asyncio.run(overload.trial(server.url, seconds=4, load=3, seed=1, peak_s=1, herd=20))
    finally:
        assert stop_server(server) == 0, server.log
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
    server = start_server(small, *QUICK_START, *flags, prepare=shorten)
    try:
        claims = asyncio.run(connections.trial(server.url, 200, 2, slow=20))
        claims += asyncio.run(connections.readers_trial(server.url, 2, readers=20))
        claims += asyncio.run(connections.floods(server.url, 0.2))
    finally:
        assert stop_server(server) == 0, server.log
    assert missed(claims, "median", "open at once", "GET /healthz") == []


# --- faults ---


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["clock", "death", "disk", "worker", "step", "memory-job", "memory-limit"]
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
def test_no_request_fails_while_two_instances_are_restarted_in_turn(
    small: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rolling, "Server", ForkedServer)
    assert missed(rolling.trial(small, rounds=1, flags=QUICK_START)) == []
