import logging
import os
from pathlib import Path

import pytest

from tests.service.keys import key_line
from tminus.service.access.keyring import LOOK_S, KeyRing
from tminus.service.access.keys import MOST_BYTES


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{key_line('a', 'one')}\n{key_line('b', 'two', 'admin', jobs=3)}\n")
    return file


def name_of(ring: KeyRing, secret: str) -> str | None:
    key = ring.find(secret)
    return None if key is None else key.name


def later(ring: KeyRing, clock: Clock) -> KeyRing:
    clock.now_s += 1.01 * LOOK_S
    return ring


def test_a_key_is_found_by_its_secret_alone(file: Path) -> None:
    ring = KeyRing(file=file)
    assert [name_of(ring, secret) for secret in ("one", "two", "three", "", "One", "one ", "\ud800", "ä")] == [
        *("a", "b"),
        *[None] * 6,
    ]
    found = ring.find("two")
    assert found is not None
    assert (found.role, found.limits.jobs) == ("admin", 3)
    assert name_of(KeyRing(file.read_text()), "one") == "a", "as a text"
    assert name_of(KeyRing(), "one") is None
    assert not KeyRing().keys


def test_what_is_changed_in_the_file_holds_within_a_second(file: Path, clock: Clock) -> None:
    ring = KeyRing(file=file, clock=clock)
    file.write_text(f"{key_line('a', 'new')}\n{key_line('a', 'one')}\n")
    assert name_of(ring, "two") == "b", "it has not looked yet"
    later(ring, clock)
    assert [name_of(ring, secret) for secret in ("new", "one", "two")] == ["a", "a", None]
    replacement = file.with_name("other")
    replacement.write_text(key_line("a", "new") + "\n")
    replacement.replace(file)
    assert [name_of(later(ring, clock), secret) for secret in ("new", "one")] == ["a", None]
    assert ring.up


@pytest.mark.parametrize("broken", [b"", b"a sample", b"\xff", b"#" * (MOST_BYTES + 1), None])
def test_a_file_with_a_mistake_changes_nothing(
    file: Path, clock: Clock, broken: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring, good = KeyRing(file=file, clock=clock), file.read_bytes()
    file.unlink() if broken is None else file.write_bytes(broken)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert name_of(later(ring, clock), "one") == "a"
    assert not ring.up
    assert [record.levelname for record in caplog.records] == ["ERROR"], "once"
    assert str(file) in caplog.text
    file.write_bytes(good + key_line("c", "three").encode())
    assert name_of(later(ring, clock), "three") == "c"
    assert ring.up


def test_a_file_that_is_back_as_it_was_is_well_again(
    file: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ring, away = KeyRing(file=file, clock=clock), file.with_name("away")
    file.rename(away)
    clock.now_s += 2 * LOOK_S
    assert not ring.up, "though nobody has asked for a key"
    away.rename(file)
    clock.now_s += 2 * LOOK_S
    with caplog.at_level(logging.INFO):
        assert ring.up
    assert "has 2 keys now" in caplog.text


def test_it_is_looked_at_once_a_second_at_most(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, looks = KeyRing(file=file, clock=clock), []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looks.append(args) or stat(*args, **kwargs))
    for _ in range(1000):
        clock.now_s += LOOK_S / 100
        ring.find("one")
    assert 9 <= len(looks) <= 10


@pytest.mark.parametrize("broken", [b"", b"a sample", b"\xff", None])
def test_at_the_start_a_file_with_a_mistake_is_refused(file: Path, broken: bytes | None) -> None:
    file.unlink() if broken is None else file.write_bytes(broken)
    with pytest.raises(ValueError, match=str(file)):
        KeyRing(file=file)
    with pytest.raises(ValueError, match="there is no key"):
        KeyRing("")


def test_all_keys_are_compared_whichever_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(ours: bytes, _theirs: bytes) -> bool:
        compared.append(ours)
        return len(compared) % 2 == 1

    monkeypatch.setattr("hmac.compare_digest", compare)
    ring = KeyRing(file=file)
    ring.find("one")
    assert len(compared) == 2
