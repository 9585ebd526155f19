"""Server-sent events are decoded as the HTML standard says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.client.reading import EventDecoder, ServerSentEvent


def decode(stream: bytes) -> list[ServerSentEvent]:
    return EventDecoder().feed(stream)


def event(data: str, event: str = "message", id: str = "") -> ServerSentEvent:
    return ServerSentEvent(event, data, id)


# The first five are the examples of the standard itself.
STREAMS = {
    "lines of data": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [event("YHOO\n+2\n10")]),
    "a comment, ids, an id that is reset, a space that is kept": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [event("first event", id="1"), event("second event"), event(" third event")],
    ),
    "empty data, and an event that is not ended": (b"data\n\ndata\ndata\n\ndata:", [event(""), event("\n")]),
    "a space or none": (b"data:test\n\ndata: test\n\n", [event("test"), event("test")]),
    "CRLF": (b"event: a\r\ndata: 1\r\ndata: 2\r\n\r\n", [event("1\n2", "a")]),
    "all line ends mixed": (b"data: 1\r\ndata: 2\rdata: 3\n\r\n", [event("1\n2\n3")]),
    "a byte order mark, once": (b"\xef\xbb\xbfdata: 1\n\n\xef\xbb\xbfdata: 2\n\ndata: 3\n\n", [event("1"), event("3")]),
    "an event without data is dropped, with its name": (b"event: a\n\ndata: 1\n\n", [event("1")]),
    "an id holds for later events": (b"id: 7\ndata: 1\n\ndata: 2\n\n", [event("1", id="7"), event("2", id="7")]),
    "an id with a null is ignored": (b"id: 7\nid: 8\x00\ndata: 1\n\n", [event("1", id="7")]),
    "other line ends of Unicode are data": (
        "data: a\u2028b\u0085c\x0bd\x0ce\n\n".encode(), [event("a\u2028b\u0085c\x0bd\x0ce")]),
    "bytes that are not UTF-8": (b"data: \xff\n\n", [event("\ufffd")]),
    "unknown fields": (b"what: 1\nDATA: 2\n data: 3\ndata: 4\n\n", [event("4")]),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_as_the_standard_says(name: str) -> None:
    stream, events = STREAMS[name]
    assert decode(stream) == events


@pytest.mark.parametrize("name", STREAMS)
def test_how_it_is_cut_makes_no_difference(name: str) -> None:
    stream, events = STREAMS[name]
    decoder = EventDecoder()
    assert [each for k in range(len(stream)) for each in decoder.feed(stream[k : k + 1])] == events


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: 1", b"id: 2", b"event: e", b":", b"\xef\xbb\xbf", b""]))
)
def test_any_pieces_give_what_the_whole_gives(pieces: list[bytes]) -> None:
    decoder = EventDecoder()
    assert [each for piece in pieces for each in decoder.feed(piece)] == decode(b"".join(pieces))
