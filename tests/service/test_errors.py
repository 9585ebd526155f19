import json

import pytest

from tminus.service.errors import Draining, InvalidField, NotReady, Overloaded, ServiceError, masked, short


def test_a_problem_has_the_members_of_rfc_9457_and_ours() -> None:
    error = InvalidField.of("steps", "an integer in 1..10", 11)
    assert error.problem() == {
        "type": "urn:tminus:problem:invalid_field",
        "title": "A parameter is invalid",
        "status": 422,
        "code": "invalid_field",
        "detail": "steps must be an integer in 1..10, got 11",
        "field": "steps",
        "value": 11,
        "bound": "an integer in 1..10",
        "errors": [error.fault()],
    }


def test_a_problem_without_a_field_has_no_empty_members() -> None:
    assert ServiceError("oh").problem().keys() == {"type", "title", "status", "code", "detail"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (5, 5),
        (2.5, 2.5),
        (True, True),
        ("text", "text"),
        ([1, "a"], [1, "a"]),
        (2**200, str(2**200)),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "…"),
        ({"a": "b" * 500}, '{"a": "' + "b" * 193 + "…"),
    ],
)
def test_a_value_is_shown_unchanged_or_shortened(value: object, shown: object) -> None:
    assert InvalidField("no", field="x", value=value).problem()["value"] == shown


def test_the_secret_of_a_key_is_masked_whatever_is_before_it_and_a_parameter_of_links_is_not() -> None:
    for text in ("tm_{}", "%20tm_{}", "xtm_{} y", "key_tm_{}", "\\ntm_{}", "utm_{}&utm_source=x", "100% tm_{}%"):
        assert masked(text.format("a-b_c")) == text.format("…")
    for text in ("Tm_Ab", "%74m_%41b", "%2574%6D%255fAb", "tm_source_b"):
        assert masked(f"(%20{text}%20)") == "(%20tm_…%20)"
    links = "utm_source=x&utm_medium=y&UTM_ID=z&utm_creative_format"
    assert masked(links) == links


def test_the_secret_of_a_key_is_masked_without_its_prefix_and_with_html_entities_and_no_other_name_is() -> None:
    bare = "Ab3_" * 10 + "c-D"
    for text in ("{}", "key={}", "tm&#95;{}", "tm&#x5f;{}", "tm%26%2395%3B{}", "%2{}", "x-{}"):
        assert bare[1:] not in masked(text.format(bare)), text
    assert bare[1:] not in masked(f"tm_{bare}".replace("_", "&#95;"))
    assert "Ab3" not in str(short("x" * 180 + "=" + bare)), "also where the end of what is shown is within it"
    for harmless in ("a1" * 32, "tminus_a_metric_of_more_than_forty_three_characters", "Ab3_" * 10, "a &#95; b &amp;"):
        assert masked(harmless) == harmless


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), "\ud800", ["\udfff"], {"\ud800": 1}])
def test_a_problem_is_valid_json_in_utf8_whatever_the_value(value: object) -> None:
    problem = InvalidField.of("x", "right", value).problem()
    json.dumps(problem, ensure_ascii=False, allow_nan=False).encode()


def test_temporary_refusals_say_when_to_retry() -> None:
    overloaded = Overloaded("busy", retry_after_s=7, field="jobs", value=3, bound="at most 2")
    assert [int(error.headers["Retry-After"]) for error in (overloaded, NotReady(), Draining())] == [7, 1, 5]
