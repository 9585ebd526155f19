import io
import json
import logging
import string
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from html import unescape
from itertools import product
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.access.keys import PREFIX
from tminus.service.startup.logs import MOST_ERRORS, MOST_OTHERS, WINDOW_S, set_up_log
from tminus.service.tracing import REQUEST_ID

SECRET_CHARACTERS = string.ascii_letters + string.digits + "-_"
CASES: list[Callable[[str], str]] = [str, str.upper, str.lower, str.swapcase, str.capitalize]
PREFIXES = (PREFIX, "", "tm&#95;", "tm&#x5F;", "tm&lowbar;")
MakeLog = Callable[..., io.StringIO]


@pytest.fixture
def make_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLog]:
    """Sets up a log in place of pytest's, to a text instead of stderr."""
    root = logging.getLogger()
    level = root.level

    def make(log_format: str = "text") -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setattr("sys.stderr", text)
        set_up_log("INFO", "%(name)s %(message)s", log_format)
        return text

    yield make
    root.setLevel(level)  # by which what loggers remember of it is forgotten too


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, str]:
    """A secret as `tminus key` makes them, and a spelling of it, with text around it."""
    secret = "aB" + draw(st.text(SECRET_CHARACTERS, min_size=41, max_size=41))  # almost every one has both cases
    prefix = draw(st.sampled_from(PREFIXES))
    spelled = prefix + secret if prefix != PREFIX else draw(st.sampled_from(CASES))(prefix + secret)
    for encode in draw(st.lists(st.sets(st.sampled_from(SECRET_CHARACTERS + "%"), max_size=20), max_size=3)):
        form = draw(st.sampled_from(["%{:02x}", "%{:02X}"]))
        spelled = "".join(form.format(ord(each)) if each in encode else each for each in spelled)
    around = st.text(max_size=8) | st.sampled_from(["u", "%", "%2", "%25", "key=", "Bearer%20", "x" * 1990, "\x1b[2J"])
    return secret, draw(around) + spelled + draw(around)


@pytest.mark.parametrize(
    ("log_format", "place"),
    [*product(("text", "json"), ("message", "argument", "exception", "wrong arguments")), ("json", "field")],
)
def test_no_spelling_of_a_secret_is_written_wherever_in_a_record_it_is(
    make_log: MakeLog, log_format: str, place: str
) -> None:
    text, log = make_log(log_format), logging.getLogger("tminus.x")

    @given(spellings())
    def try_one(spelling: tuple[str, str]) -> None:
        secret, spelled = spelling
        text.seek(0)
        text.truncate()
        if place == "message":
            log.info(spelled)
        elif place == "argument":
            log.info("%s %r %s", spelled, [spelled.encode("utf-8", "replace")], {spelled: 1})
        elif place == "exception":
            try:
                raise ValueError(spelled)
            except ValueError as error:
                log.info("it failed: %s", error, exc_info=True)
        elif place == "field":
            log.info("a request", extra={"target": spelled, "client": spelled, "request_id": spelled})
        else:
            log.info("%d of %s", spelled)
        written = text.getvalue()
        assert written.endswith("\n")
        if log_format == "json" and place != "wrong arguments":
            written += "".join(map(str, json.loads(written).values()))
        while (decoded := unescape(unquote(written))) != written:
            written = decoded
        assert secret.lower() not in written.lower()

    try_one()


def test_lines_of_text_are_escaped(make_log: MakeLog) -> None:
    """A line about a checkpoint has its name, which comes from a file."""
    text = make_log()
    logging.getLogger("tminus.x").info("serving %s\nand", "\x1b[2J")
    assert text.getvalue() == "tminus.x serving \\x1b[2J\nand\n"


def test_a_log_of_json_has_an_object_a_line_with_the_fields_that_are_known(make_log: MakeLog) -> None:
    text, log = make_log("json"), logging.getLogger("tminus.x")
    log.info("a\n%s", "b\x1b[2J", extra={"job_id": "j", "status": 200, "unknown": 1})
    token = REQUEST_ID.set("r")
    try:
        raise RuntimeError("oh")
    except RuntimeError:
        log.exception("it failed")
    finally:
        REQUEST_ID.reset(token)
    first, second = map(json.loads, text.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    message = {"level": "info", "logger": "tminus.x", "message": "a\nb\x1b[2J"}
    assert first == message | {"job_id": "j", "status": 200}
    assert (second["request_id"], second["level"]) == ("r", "error")
    assert "RuntimeError: oh" in second["traceback"]


def test_a_line_that_cannot_be_filled_in_is_told_by_its_place(make_log: MakeLog) -> None:
    text = make_log()
    logging.getLogger("tminus.x").info("%d", "a")
    assert text.getvalue().startswith("a line of the log could not be written: TypeError at ")
    assert __file__ in text.getvalue()


@pytest.mark.parametrize(("level", "most"), [(logging.ERROR, MOST_ERRORS), (logging.INFO, MOST_OTHERS)])
def test_a_line_is_held_to_a_rate_and_others_are_not(
    make_log: MakeLog, monkeypatch: pytest.MonkeyPatch, level: int, most: int
) -> None:
    clock_s = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock_s)
    text, log = make_log(), logging.getLogger("tminus.x")
    for number in range(most + 7):
        log.log(level, "line %d of %s", number, "many")
    log.log(level, "another line")
    logging.getLogger("tminus.y").log(level, "line %d of %s", 0, "another logger's")
    lines = text.getvalue().splitlines()
    assert lines[most - 1 :] == [
        f"tminus.x line {most - 1} of many",
        "tminus.x another line",
        "tminus.y line 0 of another logger's",
    ]
    clock_s += WINDOW_S
    log.log(level, "line %d of %s", 1, "the next window")
    log.log(level, "line %d of %s", 2, "the next window")
    assert text.getvalue().splitlines()[len(lines) :] == [
        "tminus.x 7 more lines like this one are left out: line %d of %s",
        "tminus.x line 1 of the next window",
        "tminus.x line 2 of the next window",
    ]


def test_lines_that_differ_after_their_first_line_are_counted_together(make_log: MakeLog) -> None:
    """As those of asyncio are, of an accept that fails thousands of times a second."""
    text, log = make_log(), logging.getLogger("asyncio")
    for number in range(MOST_ERRORS + 7):
        log.error(f"socket.accept() out of system resource\nsocket: <socket {number}>")
    assert text.getvalue().count("out of system resource") == text.getvalue().count("socket: ") == MOST_ERRORS
