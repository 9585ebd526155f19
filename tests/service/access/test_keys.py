import hashlib
import logging
import os
from pathlib import Path
from string import ascii_letters, digits

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.keys import key_line
from tminus.service.access.keys import (
    LOOK_S,
    MOST,
    MOST_BYTES,
    MOST_KEYS,
    ROLES,
    Key,
    KeyLimits,
    KeyRing,
    digest_of,
    new_secret,
    parse_keys,
    to_line,
)

HEX = "ab" * 32
LIMIT = st.none() | st.integers(1, MOST)
KEYS = st.builds(
    Key,
    name=st.text(ascii_letters + digits + "._-", min_size=1, max_size=64),
    role=st.sampled_from(ROLES),
    digest=st.binary(min_size=32, max_size=32),
    limits=st.builds(KeyLimits, LIMIT, LIMIT, LIMIT),
)


@given(st.lists(KEYS, min_size=1, max_size=9, unique_by=(lambda key: key.name, lambda key: key.digest)))
def test_lines_are_read_as_what_was_written_among_comments_and_empty_lines(keys: list[Key]) -> None:
    text = "\n\n# keys\n".join(f"  {to_line(key)}  # of somebody" for key in keys)
    assert parse_keys(text) == tuple(keys)


def test_the_hash_is_that_which_sha256sum_prints() -> None:
    assert digest_of("tm_x").hex() == hashlib.sha256(b"tm_x").hexdigest()


def test_a_secret_is_new_each_time_and_long() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert min(map(len, secrets)) >= 3 + 43, "256 bits in base64"
    assert all(secret.startswith("tm_") and secret.isascii() and secret.isprintable() for secret in secrets)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no key"),
        ("# one\n\na sample", "line 3: a key is NAME ROLE sha256:HEX and its limits, got 2 words"),
        (f"a/b sample sha256:{HEX}", "a name has"),
        (f"a root sha256:{HEX}", "the role of a must be sample or admin, got 'root'"),
        ("a sample tm_the_secret_itself", "the hash of a must be sha256:"),
        (f"a sample md5:{HEX}", "sha256:"),
        (f"a sample sha256:{HEX} rows=3", "no limit 'rows'; known: row-steps-per-minute, jobs, connections"),
        (f"a sample sha256:{HEX} jobs=0", "jobs of a must be an integer in 1.."),
        (f"a sample sha256:{HEX} jobs=\u0663", "must be an integer"),
        (f"a sample sha256:{HEX} jobs={'9' * 5000}", "must be an integer"),
        (f"a sample sha256:{HEX} jobs=2 jobs=2", "given twice"),
        (f"a sample sha256:{HEX}\na admin sha256:{'cd' * 32}", "two lines of a differ"),
        (f"a sample sha256:{HEX}\nb sample sha256:{HEX}", "b has the secret of a"),
        ("\n".join(f"k{i} sample sha256:{i:064x}" for i in range(MOST_KEYS + 1)), f"at most {MOST_KEYS} keys"),
        ("#" * (MOST_BYTES + 1), f"at most {MOST_BYTES} bytes"),
    ],
)
def test_a_mistake_is_named_and_no_secret_repeated(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_keys(text)
    assert said in str(caught.value)
    assert "tm_the_secret" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert parse_keys(text)
    except ValueError as error:
        assert str(error)


# --- the keys in force ---


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


def names(ring: KeyRing, *secrets: str) -> list[str | None]:
    found = [ring.find(secret) for secret in secrets]
    return [None if key is None else key.name for key in found]


def later(ring: KeyRing, clock: Clock) -> KeyRing:
    clock.now_s += 1.01 * LOOK_S
    return ring


def test_a_key_is_found_by_its_secret_alone(file: Path) -> None:
    assert names(KeyRing(file.read_text()), "one", "two") == ["a", "b"]
    assert names(KeyRing(file=file), "one", "two") == ["a", "b"]
    assert names(KeyRing(file=file), "three", "", "One", "one ", "\ud800", "ä") == [None] * 6
    assert names(KeyRing(), "one") == [None]


def test_what_is_changed_in_the_file_holds_within_a_second(file: Path, clock: Clock) -> None:
    ring = KeyRing(file=file, clock=clock)
    file.write_text(f"{key_line('a', 'new')}\n{key_line('a', 'one')}\n")
    assert names(ring, "two") == ["b"], "it has not looked yet"
    assert names(later(ring, clock), "new", "one", "two") == ["a", "a", None]
    replacement = file.with_name("other")
    replacement.write_text(key_line("a", "new") + "\n")
    replacement.replace(file)
    assert names(later(ring, clock), "new", "one") == ["a", None]
    assert ring.up


@pytest.mark.parametrize("broken", [b"", b"a sample", b"\xff", b"#" * (MOST_BYTES + 1), None])
def test_a_file_with_a_mistake_is_refused_at_the_start_and_changes_nothing_later(
    file: Path, clock: Clock, broken: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring, good, away = KeyRing(file=file, clock=clock), file.read_bytes(), file.with_name("away")
    file.rename(away)
    if broken is not None:
        file.write_bytes(broken)
    with pytest.raises(ValueError, match=str(file)):
        KeyRing(file=file)
    with caplog.at_level(logging.INFO):
        assert not later(ring, clock).up, "though nobody has asked for a key"
        for _ in range(3):
            assert names(later(ring, clock), "one") == ["a"]
    assert [record.levelname for record in caplog.records] == ["ERROR"], "once"
    assert str(file) in caplog.text
    away.replace(file)
    with caplog.at_level(logging.INFO):
        assert later(ring, clock).up, "it is back as it was"
    assert "has 2 keys now" in caplog.text
    file.write_bytes(good + key_line("c", "three").encode())
    assert names(later(ring, clock), "three") == ["c"]


def test_it_is_looked_at_once_a_second_at_most(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, looks = KeyRing(file=file, clock=clock), []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looks.append(args) or stat(*args, **kwargs))
    for _ in range(1000):
        clock.now_s += LOOK_S / 100
        ring.find("one")
    assert 9 <= len(looks) <= 10


def test_all_keys_are_compared_whichever_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(ours: bytes, _theirs: bytes) -> bool:
        compared.append(ours)
        return len(compared) % 2 == 1

    monkeypatch.setattr("hmac.compare_digest", compare)
    KeyRing(file=file).find("one")
    assert len(compared) == 2
