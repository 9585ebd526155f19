import asyncio
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from model.checkpoint import Checkpoint
from service.api.schemas import SampleRequest
from service.app import create_app
from service.engine.engine import Engine
from service.engine.executors import EagerExecutor
from service.engine.local import sample_locally
from service.images.encoder import contact_sheet
from service.jobs.sqlite_store import SqliteStore
from service.scheduling.scheduler import Sharing
from service.spec import SampleSpec
from service.work import Batch
from tests.service.conftest import MakeSite, Site, pixels, problem
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, fake_pixels, make_spec, wait_until

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}
GUIDED = {"guidance": 2, "class_label": 1}


# --- the images ---


def test_post_sample_gives_a_png_sheet_with_the_headers_of_the_contract(site: Site) -> None:
    response = site.post(json=QUICK | {"n": 4, "index": 3})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    expected = contact_sheet(fake_pixels(make_spec(n=4, seed=5, index=3), 2))
    np.testing.assert_array_equal(pixels(response.content), expected[:, :, 0])
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-job-id"])
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.headers["x-seed"] == "5"
    assert response.headers["x-fingerprint"] == INFO.fingerprint
    assert re.fullmatch(
        r"queue;dur=\d+\.\d, first_step;dur=\d+\.\d, denoise;dur=\d+\.\d, encode;dur=\d+\.\d",
        response.headers["server-timing"],
    )
    assert response.headers["x-queue-position"] == "0"
    assert re.fullmatch(r"\d+\.\d{3}", response.headers["x-eta-seconds"])
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_parameters_may_come_in_the_query(site: Site, method: str) -> None:
    response = site.client.request(method, "/sample?steps=2&seed=5&n=2&class_label=cat&class_label=1")
    assert response.status_code == 200
    np.testing.assert_array_equal(pixels(response.content).shape, (4, 12))


def test_a_short_request_shares_short_ticks_with_a_long_one(make_site: MakeSite) -> None:
    site = make_site(gate_shut=True)
    site.engine.gate.let()  # the warm-up
    site.wait_until_ready()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(site.post, json={"n": 8, "steps": 30, "class_label": 0})
        assert site.engine.next_begun().places == 8
        short = pool.submit(site.post, json={"n": 1, "steps": 3, "class_label": 0})
        wait_until(lambda: len(site.client.get("/jobs").json()["jobs"]) == 2)
        site.engine.gate.open()
        assert [long.result().status_code, short.result().status_code] == [200, 200]
    assert [batch.places for batch in site.engine.batches[1:6]] == [8, 4, 4, 4, 8]


def test_query_and_body_join(site: Site) -> None:
    response = site.post(params={"n": 2, "seed": 7}, json={"steps": 3, "seed": 7})
    assert response.status_code == 200
    assert response.headers["x-seed"] == "7"
    assert site.engine.batches[-1].steps == (2, 2)


def test_no_parameters_at_all_make_one_image_of_all_steps(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, num_timesteps=10))
    first, second = site.post(), site.client.get("/sample")
    assert first.status_code == second.status_code == 200
    assert site.engine.batches[-1].steps == (9,)
    assert 0 <= int(first.headers["x-seed"]) < 2**53
    assert first.headers["x-seed"] != second.headers["x-seed"]
    assert first.headers["x-job-id"] != second.headers["x-job-id"]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "image/png"),
        ("*/*", "image/png"),
        ("application/zip", "application/zip"),
        ("application/json", "application/json"),
        ("application/json;q=0.5, image/png;q=0.4", "application/json"),
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "image/png"),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "image/png"),
    ],
)
def test_accept_chooses_the_media_type(site: Site, accept: str | None, media_type: str) -> None:
    response = site.post(json=QUICK | {"n": 3}, headers={} if accept is None else {"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    expected = fake_pixels(make_spec(n=3, seed=5), 2)[..., 0]
    if media_type == "application/zip":
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            images = np.stack([pixels(archive.read(name)) for name in archive.namelist()])
        np.testing.assert_array_equal(images, expected)
    elif media_type == "application/json":
        document = response.json()
        assert document["spec"]["seed"] == 5
        assert len(document["images"]) == 3
    else:
        assert pixels(response.content).shape == (4, 18)


def test_two_requests_share_ticks_and_get_their_own_images(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(site.post, json={"steps": 6, "seed": 1})
        site.engine.next_begun()
        quick = pool.submit(site.post, json={"steps": 3, "seed": 2})
        wait_until(lambda: site.metrics()["tminus_rows_waiting"] == 1)
        site.engine.gate.let()
        assert site.engine.seeds(site.engine.next_begun()) == {1, 2}
        site.engine.gate.open()
        responses = [slow.result(PATIENCE_S), quick.result(PATIENCE_S)]
    for response, spec, steps in zip(responses, (make_spec(seed=1), make_spec(seed=2)), (6, 3), strict=True):
        np.testing.assert_array_equal(pixels(response.content), fake_pixels(spec, steps)[0, :, :, 0])


def test_a_colour_model_makes_colour_pngs(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, channels=3))
    assert pixels(site.post(json=QUICK).content).shape == (4, 6, 3)


def test_the_real_engine_serves_what_it_samples_without_a_server(tiny: Checkpoint) -> None:
    def make_engine() -> Engine:
        device = torch.device("cpu")
        return Engine(tiny, EagerExecutor(tiny.net, device, sizes=(1,)), device, max_rows=16, max_jobs=4)

    spec = make_spec(n=3, steps=8, seed=3, guidance=2.0, class_labels=(0, 1, 2))
    expected = sample_locally(make_engine(), spec, 8, lambda rows: None)
    limits = replace(LIMITS, max_rows=16, max_jobs=4)
    sharing, store = Sharing.of(limits.max_batch), SqliteStore(None)
    with TestClient(create_app(make_engine(), limits, ((1, 0.001),), sharing, store).app) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        body = {"n": 3, "steps": 8, "seed": 3, "guidance": 2, "class_label": ["cat", 1, "2"]}
        response = client.post("/sample", json=body)
        info = client.get("/model").json()
    sheet = contact_sheet(expected)[:, :, 0]
    np.testing.assert_array_equal(pixels(response.content), sheet)
    with Image.open(io.BytesIO(response.content)) as image:
        image.load()
        recipe = json.loads(image.text["tminus"])  # type: ignore[attr-defined]
    labels = tuple(recipe["spec"]["class_labels"])
    assert SampleSpec(**recipe["spec"] | {"class_labels": labels}) == spec
    assert info["exact"] is True
    assert recipe["weights"] == info["weights_hash"] == tiny.weights_hash
    assert recipe["fingerprint"] == info["fingerprint"] == response.headers["x-fingerprint"]


# --- the request's id ---


@pytest.mark.parametrize("given", ["abc-123", "A.b:c_d", "x" * 64])
def test_a_sane_request_id_is_echoed(site: Site, given: str) -> None:
    assert site.client.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "a,b", "ü".encode("latin-1")])
def test_a_request_id_that_could_do_harm_is_replaced(site: Site, given: str | bytes) -> None:
    value = given if isinstance(given, bytes) else given.encode()
    answered = site.client.get("/healthz", headers=[(b"x-request-id", value)]).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", answered)


def test_each_request_has_an_id_of_its_own(site: Site) -> None:
    assert len({site.client.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


# --- refusals ---


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"steps": 0}, "steps", 0),
        ({"steps": 1001}, "steps", 1001),
        ({"steps": "ten"}, "steps", "ten"),
        ({"steps": 1e9}, "steps", 1000000000),
        ({"n": 0}, "n", 0),
        ({"n": 65}, "n", 65),
        ({"n": -1}, "n", -1),
        ({"sampler": "euler"}, "sampler", "euler"),
        ({"class_label": "bird"}, "class_label", "bird"),
        ({"class_label": 3}, "class_label", 3),
        ({"class_label": [0, 1]}, "class_label", [0, 1]),
        ({"eta": 0.5}, "eta", 0.5),
        ({"seed": -1}, "seed", -1),
        ({"seed": 2**64}, "seed", 2**64),
        ({"guidance": 2}, "guidance", 2),
        ({"index": -1}, "index", -1),
        ({"clip": "perhaps"}, "clip", "perhaps"),
        ({"timestep_spacing": "cosine"}, "timestep_spacing", "cosine"),
        ({"timestep_spacing": 5}, "timestep_spacing", 5),
        ({"timestep_spacing": ""}, "timestep_spacing", ""),
        (GUIDED | {"guidance_interval": [800, 100]}, "guidance_interval", [800, 100]),
        (GUIDED | {"guidance_interval": [-1, 100]}, "guidance_interval", [-1, 100]),
        (GUIDED | {"guidance_interval": [0, 1000]}, "guidance_interval", [0, 1000]),
        (GUIDED | {"guidance_interval": [100]}, "guidance_interval", [100]),
        (GUIDED | {"guidance_interval": []}, "guidance_interval", []),
        (GUIDED | {"guidance_interval": [1, 2, 3]}, "guidance_interval", [1, 2, 3]),
        (GUIDED | {"guidance_interval": [1.5, 2]}, "guidance_interval", [1.5, 2]),
        (GUIDED | {"guidance_interval": ["a", "b"]}, "guidance_interval", ["a", "b"]),
        (GUIDED | {"guidance_interval": [False, True]}, "guidance_interval", [False, True]),
        (GUIDED | {"guidance_interval": 100}, "guidance_interval", 100),
        (GUIDED | {"guidance_interval": "100"}, "guidance_interval", "100"),
        ({"guidance_interval": [100, 800]}, "guidance_interval", [100, 800]),
        ({"deadline_s": 0}, "deadline_s", 0),
        ({"deadline_s": -1.5}, "deadline_s", -1.5),
        ({"deadline_s": 86401}, "deadline_s", 86401),
        ({"deadline_s": "soon"}, "deadline_s", "soon"),
        ({"deadline_s": "nan"}, "deadline_s", "nan"),
        ({"deadline_s": "inf"}, "deadline_s", "inf"),
        ({"deadline_s": True}, "deadline_s", True),
        ({"deadline_s": [5]}, "deadline_s", [5]),
    ],
)
def test_a_bad_parameter_is_a_problem_with_its_field_value_and_bound(
    site: Site, parameters: dict[str, Any], field: str, value: object
) -> None:
    document = problem(site.post(json=parameters), 422, "invalid_field")
    assert (document["field"], document["value"]) == (field, value)
    assert document["bound"]
    assert field in document["detail"]
    assert site.engine.batches[1:] == [], "no work was done"


def test_guidance_of_an_unconditional_model_is_a_problem(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, conditional=False, class_names=(), null_class=None))
    assert problem(site.post(json={"guidance": 2}), 422, "invalid_field")["field"] == "guidance"
    assert problem(site.post(json={"class_label": 0}), 422, "invalid_field")["field"] == "class_label"
    assert site.post(json={"steps": 2}).status_code == 200


def test_an_unknown_parameter_is_a_problem_in_query_and_body(site: Site) -> None:
    for response in (site.post(params={"stepz": 5}), site.post(json={"stepz": 5})):
        document = problem(response, 422, "unknown_field")
        assert document["field"] == "stepz"
        assert "steps" in document["bound"]


def test_a_field_with_two_values_is_a_problem(site: Site) -> None:
    for response in (site.post(params={"steps": 2}, json={"steps": 3}), site.post(params={"steps": [2, 3]})):
        assert problem(response, 422, "conflicting_field")["field"] == "steps"


@pytest.mark.parametrize("body", [b"steps=2", b"[]", b"{", b"\xff", b'{"steps": NaN}', b"[" * 3000])
def test_a_body_that_is_no_json_object_is_a_problem(site: Site, body: bytes) -> None:
    problem(site.post(content=body), 400, "malformed_body")


def test_an_accept_that_cannot_be_met_is_a_problem_before_any_work(site: Site) -> None:
    document = problem(site.post(json=QUICK, headers={"Accept": "text/html"}), 406, "not_acceptable")
    assert document["bound"] == "one of image/png, application/zip, application/json, image/webp"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/sample/more", 404, "not_found"),
        ("DELETE", "/sample", 405, "method_not_allowed"),
        ("POST", "/model", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("PUT", "/jobs", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods_are_problems_too(site: Site, method: str, path: str, status: int, code: str) -> None:
    response = site.client.request(method, path)
    problem(response, status, code)
    if status == 405:
        assert response.headers["allow"] == ("GET, POST" if path in ("/sample", "/jobs") else "GET")


def test_text_that_no_encoding_knows_is_a_problem_and_no_crash(site: Site) -> None:
    for body in (b'{"sampler": "\\ud800"}', b'{"\\ud800": 1}', b'{"class_label": "\\udfff"}', b'{"steps": "\\ud800"}'):
        response = site.post(content=body)
        assert response.status_code in (400, 422), (body, response.text)
        assert response.headers["content-type"] == "application/problem+json"


def test_a_number_too_large_for_json_is_a_problem_in_valid_json(site: Site) -> None:
    for field in ("steps", "guidance", "seed", "eta"):
        response = site.post(content=f'{{"{field}": 1e400}}'.encode())
        assert problem(response, 422, "invalid_field")["field"] == field


@pytest.mark.parametrize("query", ["", "?steps=1&class_label=1"])
def test_no_depth_of_nesting_crashes(site: Site, query: str) -> None:
    for field in (b"steps", b"class_label", b"extra"):
        for depth in range(100, 1400, 25):
            response = site.client.post(f"/sample{query}", content=b'{"%s": %s}' % (field, b"[" * depth + b"]" * depth))
            assert response.status_code in (400, 422), (field, depth)


# --- the body's size ---


def test_a_body_over_the_limit_is_refused_by_its_content_length(site: Site) -> None:
    document = problem(site.post(content=b" " * 4097), 413, "body_too_large")
    assert document["field"] == "body"
    assert "4096" in document["bound"]


def test_a_body_at_the_limit_is_read(site: Site) -> None:
    body = json.dumps(QUICK).encode()
    assert site.post(content=body.ljust(4096)).status_code == 200


def test_a_body_that_only_turns_out_too_large_is_not_read_to_its_end(site: Site) -> None:
    sent: list[int] = []

    def receive() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            sent.append(i)
            yield {"type": "http.request", "body": b" " * 1000, "more_body": True}

    status, headers, body = call(site.app, receive())
    assert status == 413
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["code"] == "body_too_large"
    assert len(sent) == 5


# --- guidance interval and timestep spacing ---


def test_a_guidance_interval_comes_in_body_and_query_alike(site: Site) -> None:
    answers = [
        site.post(json=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
        site.post(params=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
        site.client.get("/sample?steps=2&seed=5&class_label=1&guidance=2&guidance_interval=100&guidance_interval=800"),
        site.post(params={"guidance_interval": [100, 800]}, json=QUICK | GUIDED | {"guidance_interval": [100, 800]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.headers["etag"] for answer in answers}) == 1
    with Image.open(io.BytesIO(answers[0].content)) as image:
        image.load()
        spec = json.loads(image.text["tminus"])["spec"]  # type: ignore[attr-defined]
    assert spec["guidance_interval"] == [100, 800]


def test_the_order_of_an_interval_in_the_query_counts(site: Site) -> None:
    response = site.post(params=GUIDED | {"guidance_interval": [800, 100]})
    document = problem(response, 422, "invalid_field")
    assert (document["field"], document["value"]) == ("guidance_interval", [800, 100])
    assert document["bound"] == "two integers [lo, hi] with 0 <= lo <= hi <= 999"


def test_guidance_takes_its_second_place_inside_the_interval_only(site: Site) -> None:
    before = len(site.engine.batches)
    site.post(json={"steps": 10, "seed": 5} | GUIDED | {"guidance_interval": [300, 600]})
    places = [batch.places for batch in site.engine.batches[before:]]
    assert places == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1], "t = 900, 800, ... 0"


@pytest.mark.parametrize("interval", [[0, 0], [999, 999], [0, 999]])
def test_both_ends_of_the_interval_may_be_anywhere(site: Site, interval: list[int]) -> None:
    assert site.post(json=QUICK | GUIDED | {"guidance_interval": interval}).status_code == 200


def test_timestep_spacing_defaults_to_the_samplers_and_may_be_chosen(site: Site) -> None:
    def spec(**fields: object) -> dict[str, Any]:
        response = site.post(json=QUICK | fields)
        with Image.open(io.BytesIO(response.content)) as image:
            image.load()
            found: dict[str, Any] = json.loads(image.text["tminus"])["spec"]  # type: ignore[attr-defined]
        return found

    assert spec()["timestep_spacing"] == "leading"
    assert spec(sampler="dpmpp_2m")["timestep_spacing"] == "karras"
    assert spec(timestep_spacing="trailing")["timestep_spacing"] == "trailing"


# --- load, readiness, the end ---


def test_an_overloaded_server_answers_429_with_a_time(make_site: MakeSite) -> None:
    site = make_site(max_jobs=1)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        response = site.post(json=QUICK)
        document = problem(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert (document["field"], document["value"], document["bound"]) == ("jobs", 2, "at most 1")
        site.engine.gate.open()
        assert running.result(PATIENCE_S).status_code == 200
    assert site.post(json=QUICK).status_code == 200


def test_before_the_warm_up_the_server_lives_but_is_not_ready(make_site: MakeSite) -> None:
    site = make_site(gate_shut=True)
    site.engine.next_begun()
    assert site.client.get("/healthz").json() == {"status": "alive"}
    for response in (site.client.get("/readyz"), site.post(json=QUICK)):
        problem(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
    assert site.client.get("/model").status_code == 200
    assert site.client.get("/metrics").status_code == 200
    site.engine.gate.open()
    wait_until(lambda: site.client.get("/readyz").status_code == 200)
    assert site.client.get("/readyz").json() == {"status": "ready"}
    assert site.post(json=QUICK).status_code == 200


def test_a_draining_server_refuses_new_work_and_answers_the_old(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        site.worker.drain()
        for response in (site.post(json=QUICK), site.client.get("/readyz")):
            problem(response, 503, "draining")
            assert int(response.headers["retry-after"]) >= 1
        assert site.client.get("/healthz").status_code == 200
        site.engine.gate.open()
        assert running.result(PATIENCE_S).status_code == 200


def test_work_given_up_at_the_end_of_the_grace_period_is_told_so(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        closing = pool.submit(site.worker.close)
        wait_until(lambda: not site.worker.alive)
        site.engine.gate.let()
        problem(running.result(PATIENCE_S), 503, "draining")
        closing.result(PATIENCE_S)


def test_a_dead_worker_fails_the_liveness_probe(make_site: MakeSite) -> None:
    def break_(_batch: Batch) -> None:
        raise RuntimeError("no kernel image")

    site = make_site(gate_shut=True)
    site.engine.on_step = break_
    site.engine.gate.open()
    wait_until(lambda: not site.worker.alive)
    problem(site.client.get("/healthz"), 500, "engine_failed")
    problem(site.client.get("/readyz"), 500, "engine_failed")
    problem(site.post(json=QUICK), 500, "engine_failed")
    site.engine.jobs.clear()  # the warm-up's own slots died with the worker


# --- failures of ours ---


def test_a_failed_step_is_a_500_that_tells_no_secrets(site: Site) -> None:
    def fail(_batch: Batch) -> None:
        raise RuntimeError("secret")

    site.engine.on_step = fail
    response = site.post(json=QUICK)
    problem(response, 500, "engine_failed")
    assert "secret" not in response.text
    site.engine.on_step = lambda batch: None
    assert site.post(json=QUICK).status_code == 200


def test_an_unforeseen_error_is_a_500_that_tells_no_secrets(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr("service.images.encoder.encode_result", fail)
    response = site.post(json=QUICK)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_an_unforeseen_error_has_the_requests_id_and_is_counted_as_500(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr("service.images.encoder.encode_result", fail)
    response = site.post(json=QUICK, headers={"X-Request-ID": "mine"})
    assert response.headers.get("x-request-id") == "mine"
    assert site.metrics()['tminus_request_duration_seconds_count{"route": "/sample", "status": "500"}'] == 1


def test_a_spec_the_engine_refuses_is_a_422(site: Site) -> None:
    def refuse(_spec: SampleSpec) -> None:
        raise ValueError("not with this schedule")

    site.engine.on_add = refuse
    assert problem(site.post(json=QUICK), 422, "invalid_field")["field"] == "sampler"


# --- a client that goes away ---


def scope_of(path: str = "/sample", query: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": ("test", 1),
        "server": ("test", 80),
    }


def call(
    app: FastAPI,
    messages: Iterator[dict[str, Any]],
    scope: dict[str, Any] | None = None,
    before_last: Callable[[], object] = lambda: None,
) -> tuple[int, dict[str, str], bytes]:
    """Call an app with these messages, then a disconnect that waits for `before_last`. Status 0: nothing was sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.to_thread(before_last)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def main() -> None:
        await asyncio.wait_for(app(scope or scope_of(), receive, send), PATIENCE_S)  # type: ignore[arg-type]

    asyncio.run(main())
    start = sent[0] if sent else {"status": 0, "headers": []}
    headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message.get("body", b"") for message in sent)


def test_a_client_that_goes_away_frees_its_rows_at_the_next_tick(site: Site) -> None:
    body = json.dumps({"n": 4, "steps": 1000, "seed": 1}).encode()
    site.engine.gate.shut()
    request = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, _, _ = call(site.app, request, before_last=site.engine.next_begun)
    assert status in (0, 499)
    site.engine.gate.let()
    wait_until(lambda: not site.engine.jobs)
    ticks = len(site.engine.batches) - 1
    assert ticks == 1
    site.engine.gate.open()
    assert site.post(json=QUICK).status_code == 200
    metrics = site.metrics()
    assert metrics['tminus_cancelled_total{"reason": "client_gone"}'] == 1
    assert metrics["tminus_row_steps_saved_total"] == 4 * 1000 - 4
    assert metrics["tminus_backlog_seconds"] == 0
    assert metrics['tminus_request_duration_seconds_count{"route": "/sample", "status": "499"}'] == 1
    assert not any(name.startswith("tminus_rejected_total") for name in metrics)


def test_one_client_going_away_leaves_the_others_alone(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(site.post, json={"steps": 5, "seed": 2})
        site.engine.next_begun()
        body = json.dumps({"n": 4, "steps": 1000, "seed": 1}).encode()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        def next_tick_has_both() -> None:
            site.engine.gate.let()
            assert site.engine.seeds(site.engine.next_begun()) == {1, 2}

        call(site.app, request, before_last=next_tick_has_both)
        site.engine.gate.open()
        response = stays.result(PATIENCE_S)
    np.testing.assert_array_equal(pixels(response.content), fake_pixels(make_spec(seed=2), 5)[0, :, :, 0])


def test_a_client_that_goes_away_within_its_body_is_no_error_of_ours(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    call(site.app, iter([{"type": "http.request", "body": b'{"steps"', "more_body": True}]))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert site.post(json=QUICK).status_code == 200


# --- what is loaded, and how it is doing ---


def test_model_tells_what_is_loaded_and_the_limits(make_site: MakeSite) -> None:
    site = make_site(max_n=9, max_backlog_s=12.5)
    response = site.client.get("/model")
    assert response.status_code == 200
    document = response.json()
    assert (document["limits"]["max_n"], document["limits"]["max_backlog_s"]) == (9, 12.5)
    assert "log_sigmas" not in document, "/model/schedule has the numbers of each timestep"
    assert problem(site.post(json={"n": 10}), 422, "invalid_field")["bound"] == "an integer in 1..9"


METRICS = {
    "tminus_step_duration_seconds": "histogram",
    "tminus_batch_rows": "histogram",
    "tminus_row_steps": "counter",
    "tminus_rows_active": "gauge",
    "tminus_rows_waiting": "gauge",
    "tminus_backlog_seconds": "gauge",
    "tminus_request_duration_seconds": "histogram",
    "tminus_queue_wait_seconds": "histogram",
    "tminus_time_to_first_step_seconds": "histogram",
    "tminus_images": "counter",
    "tminus_rejected": "counter",
    "tminus_cancelled": "counter",
    "tminus_row_steps_saved": "counter",
    "tminus_answered_without_work": "counter",
    "tminus_encode_duration_seconds": "histogram",
    "tminus_model_info": "gauge",
    "tminus_device_memory_bytes": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_cpu_seconds": "counter",
}


def test_metrics_parse_and_have_each_family_of_the_contract(site: Site) -> None:
    site.post(json=QUICK)
    response = site.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {name: families[name].type for name in METRICS if name in families} == METRICS
    for family in families.values():
        assert family.documentation, family.name
    info = families["tminus_model_info"].samples[0].labels
    assert info["name"] == INFO.name
    assert info["weights"] == INFO.weights_hash[:16]
    assert info["fingerprint"] == INFO.fingerprint
    assert (info["executor"], info["precision"]) == (INFO.executor, INFO.precision)


def test_metrics_count_what_happened(site: Site) -> None:
    site.post(json=QUICK | {"n": 3})
    site.post(json=QUICK | {"sampler": "ddim", "guidance": 2}, headers={"Accept": "application/zip"})
    site.post(json={"steps": 0})
    site.post(json={"stepz": 0})
    site.client.get("/nowhere")
    metrics = site.metrics()
    assert metrics["tminus_images_total"] == 4
    assert metrics['tminus_row_steps_total{"sampler": "ddpm"}'] == 6
    assert metrics['tminus_row_steps_total{"sampler": "ddim"}'] == 2
    assert metrics["tminus_batch_rows_sum"] == 6 + 4
    assert metrics['tminus_rejected_total{"reason": "invalid_field"}'] == 1
    assert metrics['tminus_rejected_total{"reason": "unknown_field"}'] == 1
    assert metrics['tminus_encode_duration_seconds_count{"kind": "png"}'] == 1
    assert metrics['tminus_encode_duration_seconds_count{"kind": "zip"}'] == 1
    requests = "tminus_request_duration_seconds_count"
    assert metrics[f'{requests}{{"route": "/sample", "status": "200"}}'] == 2
    assert metrics[f'{requests}{{"route": "/sample", "status": "422"}}'] == 2
    assert metrics[f'{requests}{{"route": "unmatched", "status": "404"}}'] == 1
    assert metrics["tminus_rows_waiting"] == metrics["tminus_backlog_seconds"] == 0
    assert metrics["tminus_device_memory_bytes"] == 0


def test_probes_of_a_server_that_warms_up_are_no_rejected_requests(make_site: MakeSite) -> None:
    site = make_site(gate_shut=True)
    site.client.get("/readyz")
    assert not any(name.startswith("tminus_rejected_total") for name in site.metrics())


def test_rows_waiting_and_active_add_up_while_work_runs(make_site: MakeSite) -> None:
    site = make_site(max_batch=4)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK | {"n": 10})
        site.engine.next_begun()
        metrics = site.metrics()
        assert (metrics["tminus_rows_active"], metrics["tminus_rows_waiting"]) == (4, 6)
        assert metrics["tminus_backlog_seconds"] > 0
        site.engine.gate.open()
        running.result(PATIENCE_S)


# --- the documentation ---


def test_openapi_is_valid_and_has_every_parameter(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    OpenAPI.model_validate(document)
    assert {"/jobs", "/jobs/{job_id}"} <= document["paths"].keys()
    assert {"/sample", "/model", "/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    for method in ("get", "post"):
        operation = document["paths"]["/sample"][method]
        parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
        assert parameters.keys() == SampleRequest.model_fields.keys() - {"image", "mask"} | {"every", "show"}
        for name, parameter in parameters.items():
            assert parameter["in"] == "query"
            assert parameter["description"], name
            assert parameter["schema"], name
        content = operation["responses"]["200"]["content"]
        assert {"image/png", "application/zip", "application/json"} <= content.keys()
    assert "requestBody" not in document["paths"]["/sample"]["get"]
    for path in ("/sample", "/jobs"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for kind in ("application/json", "multipart/form-data"):
            assert content[kind]["schema"]["properties"].keys() == SampleRequest.model_fields.keys()
        files = content["multipart/form-data"]["schema"]["properties"]
        assert files["image"]["format"] == files["mask"]["format"] == "binary"


def test_every_reference_in_openapi_leads_somewhere_and_operations_have_ids_of_their_own(site: Site) -> None:
    document = site.client.get("/openapi.json").json()

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for reference in walk(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def test_docs_is_a_page(site: Site) -> None:
    response = site.client.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in response.text


def test_two_apps_in_one_process_share_nothing(make_site: MakeSite) -> None:
    one, other = make_site(), make_site()
    one.post(json=QUICK)
    assert one.metrics()["tminus_images_total"] == 1
    assert other.metrics()["tminus_images_total"] == 0


# --- what is echoed ---


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", {"x" * 100_000: 1}),
        ("", {"sampler": "x" * 100_000}),
        ("", {"class_label": ["x" * 100_000]}),
        ("", {"class_label": list(range(20_000))}),
        ("", {"steps": {"x" * 100_000: 1}}),
        ("?sampler=ddim", {"sampler": "x" * 100_000}),
        ("?steps=" + "9" * 30_000, {}),
        ("?sampler=a&sampler=" + "b" * 30_000, {}),
        ("?" + "x" * 30_000 + "=1", {}),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_no_problem_echoes_a_large_request(make_site: MakeSite, query: str, body: dict[str, Any]) -> None:
    response = make_site(max_body_bytes=2**20).client.post(f"/sample{query}", json=body)
    assert response.status_code == 422
    assert len(response.content) < 3000
