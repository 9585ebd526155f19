import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.access.keys import (
    MOST,
    MOST_BYTES,
    MOST_KEYS,
    ROLES,
    Key,
    KeyLimits,
    digest_of,
    new_secret,
    parse_keys,
    to_line,
)

HEX = "ab" * 32
LIMIT = st.none() | st.integers(1, MOST)
KEYS = st.builds(
    Key,
    name=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    role=st.sampled_from(ROLES),
    digest=st.binary(min_size=32, max_size=32),
    limits=st.builds(KeyLimits, LIMIT, LIMIT, LIMIT),
)


@given(KEYS)
def test_a_line_is_read_as_what_was_written(key: Key) -> None:
    assert parse_keys(to_line(key)) == (key,)


@given(st.lists(KEYS, min_size=1, max_size=9, unique_by=(lambda key: key.name, lambda key: key.digest)))
def test_so_are_several_among_comments_and_empty_lines(keys: list[Key]) -> None:
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
        ("a sample", "got 2 words"),
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


def test_a_mistake_names_its_line() -> None:
    with pytest.raises(ValueError, match=r"^line 3: "):
        parse_keys(f"# one\na sample sha256:{HEX}\nb")


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert parse_keys(text)
    except ValueError as error:
        assert str(error)
