"""Calls with one answer, and the list of jobs, sync and async."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.receivers import receiver
from tests.service.client.breaking import Breaking
from tests.service.client.conftest import ADMIN_KEY, COLOUR, SPARE, SPEC, Connect, Served
from tests.service.conftest import INSTANT, pixels
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, fake_pixels, make_spec
from tests.service.webhooks import rules
from tminus.service.client import Done, Ended, Problem, Unreachable


def test_a_sheet_a_zip_and_a_document_hold_the_same_images(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    sheet, archive, document = (
        tminus.sample(accept=accept, **SPEC) for accept in ("image/png", "application/zip", "application/json")
    )
    images = fake_pixels(make_spec(**SPEC), 4)[..., 0]
    assert (pixels(sheet.data) == images.reshape(1, 2, 4, 6).swapaxes(1, 2).reshape(4, 12)).all()
    assert sheet.pngs == [sheet.data]
    assert list(archive.files) == ["00000.png", "00001.png"]
    for made in (archive, document):
        assert [(pixels(png) == image).all() for png, image in zip(made.pngs, images, strict=True)] == [True, True]
    assert document.document["images"][1]["index"] == 1
    for made in (sheet, archive, document):
        assert (made.seed, made.fingerprint, len(made.job_id)) == (5, INFO.fingerprint, 32)
        assert made.timings_s.keys() == {"queue", "first_step", "denoise", "encode"}
        assert 0 <= made.timings_s["denoise"] < PATIENCE_S


def test_noise_is_added_to_an_image(served: Served, connect: Connect, tmp_path: Path) -> None:
    tminus = connect(served.url)
    png = tminus.sample(steps=1, seed=0).data
    noised = tminus.noise(png, t=3, seed=4)
    assert (pixels(noised.data) == pixels(png) + 7).all()
    assert (noised.seed, noised.alpha_bar, noised.fingerprint) == (4, INFO.alpha_bar(3), INFO.fingerprint)
    (tmp_path / "x.png").write_bytes(png)
    assert tminus.noise(tmp_path / "x.png", 3, 4) == noised
    assert tminus.noise(png, t=0).seed >= 0
    with pytest.raises(Problem, match="t must be"):
        tminus.noise(png, t=1000)


def test_an_answer_that_is_lost_makes_no_second_job(served: Served, connect: Connect) -> None:
    transport = Breaking(0, 0)
    tminus = connect(served.url, transport=transport)
    job = tminus.submit(steps=1)
    assert [request.url.path for request in transport.requests] == ["/jobs"] * 3
    assert len({request.headers["idempotency-key"] for request in transport.requests}) == 1
    assert [state.id for state in tminus.jobs()] == [job.id]
    assert tminus.submit(steps=1).id != job.id, "each call has a key of its own"
    assert tminus.submit(steps=1, idempotency_key="mine").id == tminus.submit(steps=1, idempotency_key="mine").id
    with pytest.raises(Problem) as caught:
        tminus.submit(steps=2, idempotency_key="mine")
    assert caught.value.code == "idempotency_key_reused"


# --- several models ---


def test_all_calls_of_a_client_with_a_model_are_of_this_model(several: Served, connect: Connect) -> None:
    tminus, default = connect(several.url, model="colour"), connect(several.url)
    assert tminus.model()["name"] == "colour"
    assert default.model()["name"] == "fake"
    sampled = tminus.sample(**SPEC)
    assert pixels(sampled.data).shape == (4, 12, 3)
    assert sampled.fingerprint == COLOUR.fingerprint
    done = list(tminus.watch(**SPEC))[-1]
    assert isinstance(done, Done)
    assert done.images == (sampled.data,)
    assert tminus.noise(sampled.data, t=3).fingerprint == COLOUR.fingerprint
    with pytest.raises(Problem) as caught:
        connect(several.url, model="nobody").sample()
    assert (caught.value.code, caught.value.value) == ("model_not_found", "nobody")


def test_a_job_says_which_model_it_is_of_and_every_client_finds_it(several: Served, connect: Connect) -> None:
    tminus, default = connect(several.url, model="colour"), connect(several.url)
    job, other = tminus.submit(**SPEC), default.submit(**SPEC)
    assert (job.wait(PATIENCE_S).model, other.wait(PATIENCE_S).model) == ("colour", "fake")
    *_, ended = job.events()
    assert isinstance(ended, Ended)
    assert ended.job.model == "colour"
    assert [state.id for state in tminus.jobs()] == [job.id]
    assert [state.id for state in default.jobs()] == [other.id, job.id]
    assert default.job(job.id).image().data == job.image().data == tminus.sample(**SPEC).data
    assert tminus.job(other.id).state().model == "fake"
    default.job(job.id).delete()
    assert list(tminus.jobs()) == []


def test_a_model_is_loaded_reloaded_and_unloaded(several: Served, connect: Connect) -> None:
    tminus, spare = connect(several.url, model="colour"), connect(several.url, model="spare")
    loaded = tminus.load_model("spare", ADMIN_KEY)
    assert (loaded.name, loaded.state, loaded.default) == ("spare", "loaded", False)
    assert loaded.info == spare.model()
    assert spare.sample(**SPEC).fingerprint == SPARE.fingerprint
    assert tminus.reload_model("spare", ADMIN_KEY) == loaded
    assert tminus.unload_model("spare", ADMIN_KEY) is None
    with pytest.raises(Problem, match="no model 'spare'"):
        spare.sample(**SPEC)
    assert "spare" not in [model.name for model in tminus.models() if model.state == "loaded"]


def test_a_change_that_is_refused_says_why(several: Served, served: Served, connect: Connect) -> None:
    tminus, closed = connect(several.url), connect(served.url)
    refusals: list[tuple[Callable[[], object], int, str]] = [
        (lambda: tminus.load_model("spare", "another key, wrong"), 401, "unauthorized"),
        (lambda: closed.load_model("fake", ADMIN_KEY), 403, "admin_off"),
        (lambda: tminus.load_model("nobody", ADMIN_KEY), 404, "model_not_found"),
        (lambda: tminus.reload_model("spare", ADMIN_KEY), 404, "model_not_found"),
        (lambda: tminus.unload_model("spare", ADMIN_KEY), 404, "model_not_found"),
        (lambda: tminus.load_model("colour", ADMIN_KEY), 409, "model_busy"),
        (lambda: tminus.unload_model("fake", ADMIN_KEY), 409, "model_busy"),
        (lambda: tminus.load_model("broken", ADMIN_KEY), 422, "checkpoint_refused"),
    ]
    for call, status, code in refusals:
        with pytest.raises(Problem) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (status, code)
    for name, key in (("a/b", ADMIN_KEY), ("", ADMIN_KEY), (None, ADMIN_KEY), ("spare", "key\n")):
        with pytest.raises(ValueError, match=r"model must be|no text|a key must be"):
            tminus.load_model(name, key)


def test_a_change_whose_answer_is_lost_is_not_asked_for_twice(several: Served, connect: Connect) -> None:
    transport = Breaking(0)
    tminus = connect(several.url, transport=transport, patience_s=PATIENCE_S)
    with pytest.raises(Unreachable) as caught:
        tminus.load_model("spare", ADMIN_KEY)
    assert caught.value.reached
    assert len(transport.requests) == 1
    assert "spare" in [model.name for model in tminus.models() if model.state == "loaded"], "it was done all the same"


# --- webhooks ---


def test_a_webhook_is_named_and_its_state_is_read(connect: Connect) -> None:
    limits = replace(LIMITS, max_streams=8, max_streams_per_address=8)
    with receiver() as there, Served(INFO, limits, INSTANT, webhooks=rules()).running() as site:
        tminus = connect(site.url)
        job = tminus.submit(webhook=there.url, webhook_events=["completed"], **SPEC)
        there.wait_for(1)
        state = job.wait(PATIENCE_S)
        assert state.webhook["receiver"] == there.url
        assert [each["event"] for each in state.webhook["deliveries"]] == ["completed"]
        assert tminus.submit(**SPEC).wait(PATIENCE_S).webhook is None
