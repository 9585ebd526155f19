"""Calls with one answer, and the list of jobs, sync and async."""

from pathlib import Path

import pytest

from tests.service.client.breaking import Breaking
from tests.service.client.conftest import SPEC, Connect, MakeServed, Served
from tests.service.conftest import pixels
from tests.service.fakes import INFO, PATIENCE_S, fake_pixels, make_spec
from tminus.service.client import Problem
from tminus.service.client._async import client as async_client
from tminus.service.client._sync import client as sync_client


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


def test_an_answer_from_the_cache_has_no_job(make_served: MakeServed, connect: Connect) -> None:
    tminus = connect(make_served(result_cache_bytes=10_000).url)
    first, again = tminus.sample(**SPEC), tminus.sample(**SPEC)
    assert first.data == again.data
    assert (again.job_id, again.timings_s) == (None, {})


def test_a_refusal_has_field_value_and_bound(served: Served, connect: Connect) -> None:
    with pytest.raises(Problem) as caught:
        connect(served.url).sample(steps=0)
    problem = caught.value
    assert (problem.status, problem.code, problem.field, problem.value) == (422, "invalid_field", "steps", 0)
    assert problem.bound == "an integer in 1..1000"
    assert str(problem) == "422 steps must be an integer in 1..1000, got 0"
    assert problem.retry_after_s is None


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


def test_the_model_is_described(served: Served, connect: Connect) -> None:
    assert connect(served.url).model()["class_names"] == ["cat", "dog", "3d-print"]


def test_all_pages_of_the_jobs_are_read(served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in (async_client, sync_client):
        monkeypatch.setattr(client, "PAGE", 2)
    tminus = connect(served.url)
    ids = [tminus.submit(steps=1).id for _ in range(5)]
    for job_id in ids:
        tminus.job(job_id).wait(PATIENCE_S)
    assert [state.id for state in tminus.jobs()] == ids[::-1]
    assert [state.id for state in tminus.jobs(state=["done", "failed"])] == ids[::-1]
    assert list(tminus.jobs(state="failed")) == []
    with pytest.raises(Problem, match="state must be"):
        list(tminus.jobs(state="asleep"))


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
