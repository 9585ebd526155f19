"""Answers that cost no step: with ETag and 304, and from the cache."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO
from tminus.service.images.encoder import NPY, WEBP
from tminus.service.images.trajectory import TRAJECTORY

ASKED: dict[str, Any] = {"steps": 3, "seed": 5, "class_label": "cat", "n": 2}
A_MEGABYTE = 2**20


# --- ETag ---


def ticks(site: Site, ask: Callable[[], object]) -> int:
    """How many ticks a request cost."""
    before = len(site.engine.batches)
    ask()
    return len(site.engine.batches) - before


def test_an_answer_to_a_given_seed_has_an_etag_that_is_its_own_however_it_was_asked_for(site: Site) -> None:
    without = site.post(json={"steps": 3})
    assert "etag" not in without.headers
    assert (without.headers["cache-control"], without.headers["vary"]) == ("no-store", "Accept")
    answers = [
        site.post(json=ASKED),
        site.post(params=ASKED),
        site.client.get("/sample", params=ASKED),
        site.post(json=ASKED | {"class_label": [0, 0], "sampler": "ddpm", "index": 0, "guidance": 1.0}),
        site.post(json=ASKED | {"deadline_s": 1000}),
    ]
    assert len({answer.content for answer in answers}) == 1
    (tag,) = {answer.headers["etag"] for answer in answers}
    assert tag.startswith('"')
    assert {(answer.headers["cache-control"], answer.headers["vary"]) for answer in answers} == {("no-cache", "Accept")}
    for change in ({"seed": 6}, {"index": 1}, {"class_label": "dog"}, {"guidance": 2}, {"clip": False}):
        assert site.post(json=ASKED | change).headers["etag"] != tag, change


def test_a_server_that_is_not_exact_names_no_answer(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, exact=False), result_cache_bytes=A_MEGABYTE)
    response = site.post(json=ASKED)
    assert "etag" not in response.headers
    assert ticks(site, lambda: site.post(json=ASKED, headers={"If-None-Match": "*"})) == 3
    assert ticks(site, lambda: site.client.get("/sample", params=ASKED, headers={"If-None-Match": "*"})) == 3


FORMS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ("image/png", "application/zip", "application/json", NPY, WEBP, TRAJECTORY)),
    ("image/png", {"bit_depth": 16}),
    (NPY, {"clip_output": False}),
    *((WEBP, {"every": every} | more) for every, more in ((2, {}), (1, {"show": "x_0"}))),
    *((TRAJECTORY, part) for part in ({"keep": [0, 1]}, {"keep": [1]}, {"dtype": "float16"})),
]


def test_each_form_has_an_etag_and_a_place_in_the_cache_of_its_own(make_site: MakeSite) -> None:
    site = make_site(result_cache_bytes=A_MEGABYTE)

    def ask(accept: str, more: dict[str, Any], **headers: str) -> Any:
        every = {"every": 1} if accept == WEBP else {}
        asked = ASKED | every | more
        return site.client.get("/sample", params=asked, headers={"Accept": accept} | headers)

    answers = [ask(*form) for form in FORMS]
    assert len({answer.headers["etag"] for answer in answers}) == len(FORMS)
    for form, first in zip(FORMS, answers, strict=True):
        again = ask(*form)
        assert (again.headers["cache-status"], again.content) == ("tminus; hit", first.content)
        assert again.headers["content-type"] == form[0]
        assert again.headers.get("x-value-range") == first.headers.get("x-value-range")
        assert ask(*form, **{"If-None-Match": first.headers["etag"]}).status_code == 304
    assert ask("image/png", {"bit_depth": 8}).headers["etag"] == answers[0].headers["etag"], "what there is without"
    crossed = ask("application/zip", {}, **{"If-None-Match": answers[0].headers["etag"]})
    assert crossed.status_code == 200, "the ETag of one form says nothing of another"


def test_a_client_that_has_it_gets_304_of_a_get_and_412_of_a_post_without_a_step(site: Site) -> None:
    tag = site.post(json=ASKED).headers["etag"]
    before = len(site.engine.batches)
    headers = ("{tag}", 'W/"x", W/{tag},"more"')
    asked = [(method, header) for method in ("GET", "HEAD") for header in (*headers, "*", '"other", *')]
    for method, header in asked:
        given = {"If-None-Match": header.format(tag=tag)}
        response = site.client.request(method, "/sample", params=ASKED, headers=given)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == tag
        assert response.headers["vary"] == "Accept"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-seed"] == "5"
    for header in headers:
        response = site.post(json=ASKED, headers={"If-None-Match": header.format(tag=tag)})
        document = problem(response, 412, "precondition_failed")
        assert (document["field"], document["value"]) == ("If-None-Match", tag)
    assert len(site.engine.batches) == before
    assert 'tminus_rejected_total{"reason": "precondition_failed"}' not in site.metrics()
    assert site.metrics()['tminus_answered_without_work_total{"how": "not_modified"}'] == 10
    for other in ("*", '"other"', '"', '"*"'):
        assert ticks(site, lambda other=other: site.post(json=ASKED, headers={"If-None-Match": other})) == 3


# --- the cache ---


def test_a_repeat_is_answered_from_the_cache_without_a_step(make_site: MakeSite) -> None:
    site = make_site(result_cache_bytes=A_MEGABYTE)
    first = site.post(json=ASKED)
    assert "cache-status" not in first.headers
    kept: list[Any] = []
    assert ticks(site, lambda: kept.append(site.post(json=ASKED))) == 0
    (second,) = kept
    assert second.status_code == 200
    assert second.headers["cache-status"] == "tminus; hit"
    assert second.content == first.content
    for name in ("etag", "content-type", "x-seed", "x-fingerprint", "vary"):
        assert second.headers[name] == first.headers[name], name
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert site.metrics()['tminus_answered_without_work_total{"how": "cache_hit"}'] == 1


def test_a_request_with_no_cache_is_worked_on_again_and_its_answer_is_kept_but_not_that_to_no_store(
    make_site: MakeSite,
) -> None:
    site = make_site(result_cache_bytes=A_MEGABYTE)
    no_store = {"Cache-Control": "no-store"}
    assert ticks(site, lambda: site.post(json=ASKED, headers=no_store)) == 3
    answers: list[Any] = []
    for headers in (
        {"Cache-Control": "no-cache"},
        {"Cache-Control": 'max-age=0, x="a, no-store", No-Cache'},
        {"Pragma": "no-cache"},
    ):
        assert ticks(site, lambda headers=headers: answers.append(site.post(json=ASKED, headers=headers))) == 3
        assert "cache-status" not in answers[-1].headers
        assert "x-job-id" in answers[-1].headers
        assert answers[-1].content == answers[0].content
        # If-None-Match is not answered from the cache: the server knows the ETag by itself.
        known = site.post(json=ASKED, headers=headers | {"If-None-Match": answers[0].headers["etag"]})
        assert known.status_code == 412
    assert ticks(site, lambda: site.post(json=ASKED)) == 0
    assert ticks(site, lambda: site.post(json=ASKED, headers=no_store)) == 0, "no-store alone lets a cache answer"
