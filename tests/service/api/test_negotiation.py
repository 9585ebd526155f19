import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tminus.service.api.request.headers import negotiate
from tminus.service.errors import NotAcceptable

OFFERED = ("image/png", "application/zip", "application/json")
PNG, ZIP, JSON = OFFERED


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", PNG),
        ("   ", PNG),
        ("*/*", PNG),
        ("image/png", PNG),
        ("application/zip", ZIP),
        ("application/json", JSON),
        ("Application/JSON", JSON),
        ("image/*", PNG),
        ("application/*", ZIP),
        # What browsers send for <img>: Firefox, Chrome, Safari; and for a page.
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", PNG),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", PNG),
        ("image/webp,image/avif,image/jxl,image/heic,image/heic-sequence,video/*;q=0.8,image/png,*/*;q=0.5", PNG),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", PNG),
        # Preferences.
        ("image/png;q=0.5, application/zip", ZIP),
        ("image/png;q=0.5, application/json;q=0.9, application/zip;q=0.8", JSON),
        ("application/json;q=0.5, */*;q=0.1", JSON),
        ("application/zip, application/json", ZIP),
        ("application/json, application/zip", ZIP),  # a tie: the offer's order
        # The most specific range decides, wherever it stands.
        ("*/*, image/png;q=0", ZIP),
        ("image/png;q=0, */*", ZIP),
        ("application/*, application/zip;q=0", JSON),
        ("image/*;q=0, */*;q=0.1", ZIP),
        ("*/*;q=0, application/json;q=0.001", JSON),
        # The same range twice: the better one counts.
        ("image/png;q=0.9, application/zip;q=0.5, image/png;q=0.1", PNG),
        # Case, spaces, parameters, empty members.
        (" image/png ; Q=0.1 , application/zip ; q=0.2 ", ZIP),
        (",, application/json ,", JSON),
        ("application/json;charset=utf-8", JSON),
        ("application/json;charset=utf-8;q=0.3, application/zip;q=0.2", JSON),
        # A broken q is a no to that range, not to the header.
        ("image/png;q=much, application/zip", ZIP),
        ("image/png;q=, application/zip;q=0.1", ZIP),
        # Junk beside what counts.
        ("banana, ;;;, /, */png, application/zip", ZIP),
    ],
)
def test_the_client_gets_what_it_likes_best(accept: str, expected: str) -> None:
    assert negotiate(accept, OFFERED) == expected


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/webp",
        "image/png;q=0",
        "*/*;q=0",
        "*/*;q=0.0",
        "image/*;q=0, application/*;q=0",
        "image",
        "png",
        "image/png;q=-1",
        "image/png;q=nonsense",
        ";",
        "text/*;q=0.5, video/*",
    ],
)
def test_a_client_that_likes_nothing_on_offer_is_told_what_there_is(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate(accept, OFFERED)
    error = caught.value
    assert (error.status, error.code) == (406, "not_acceptable")
    assert (error.field, error.value) == ("Accept", accept)
    assert error.bound == "one of image/png, application/zip, application/json"


def test_a_refusal_does_not_echo_a_huge_header() -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate("x/y," * 10_000, OFFERED)
    assert len(str(caught.value.problem())) < 1000


def test_a_q_that_is_not_a_number_loses() -> None:
    assert negotiate("image/png;q=nan, application/zip;q=0.1", OFFERED) == ZIP
    with pytest.raises(NotAcceptable):
        negotiate("image/png;q=nan", OFFERED)


words = ("*/*", "image/*", "text/html", ";", ",", "q=", "=", "0.5", "1", "0", "nan", "inf", "-1", "1e999", " ", "/")
pieces = st.sampled_from(OFFERED + words)


@given(st.text(max_size=40) | st.lists(pieces, max_size=12).map("".join))
@example("image/png;q=1e999")
@example("\x00")
@example("image/png;q=١")
def test_whatever_the_header_the_answer_is_on_offer_or_not_acceptable(accept: str) -> None:
    try:
        assert negotiate(accept, OFFERED) in OFFERED
    except NotAcceptable:
        pass


qualities = st.integers(0, 1000)


@given(st.tuples(qualities, qualities, qualities), st.permutations(range(3)))
def test_the_highest_quality_wins_in_any_order(thousandths: tuple[int, int, int], order: list[int]) -> None:
    header = ", ".join(f"{OFFERED[i]};q={thousandths[i] / 1000:.3f}" for i in order)
    if max(thousandths) == 0:
        with pytest.raises(NotAcceptable):
            negotiate(header, OFFERED)
    else:
        assert negotiate(header, OFFERED) == OFFERED[thousandths.index(max(thousandths))]
