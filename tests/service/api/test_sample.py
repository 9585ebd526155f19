"""GET and POST /sample, through the app on a fake engine: images, animations, edits, clients that go away."""

import base64
import io
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.service.api.asgi import call
from tests.service.api.pictures import CAT, EDIT, MASK, PICTURE, b64, encode, got, noise, same
from tests.service.conftest import MakeSite, Site, frames_of, pixels, problem
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, fake_pixels, make_spec, wait_until
from tminus.model.catalogue import SAMPLER_FACTS, Recommended
from tminus.model.timesteps import SPACINGS
from tminus.model.trajectory import LEAST_ETA
from tminus.service.api.answers import progress
from tminus.service.api.sample import MAX_FRAME_BYTES, MAX_TRAJECTORY_BYTES
from tminus.service.api.submission import warning_of
from tminus.service.images.encoder import FRAME_MS, LAST_MS, contact_sheet
from tminus.service.images.trajectory import TRAJECTORY, read_trajectory
from tminus.service.spec import SampleSpec
from tminus.service.work import timesteps_of

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}
GUIDED = {"guidance": 2, "class_label": 1}
SPEC = {"n": 2, "steps": 10, "seed": 4, "class_label": "cat"}
WEBP = {"Accept": "image/webp"}
AS_TRAJECTORY = {"Accept": TRAJECTORY}
AS_JSON = {"Accept": "application/json"}


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


def test_accept_chooses_the_media_type_and_parameters_may_come_in_the_query(site: Site) -> None:
    expected = fake_pixels(make_spec(n=3, seed=5), 2)[..., 0]
    query = "/sample?steps=2&seed=5&n=3&class_label=cat&class_label=1&class_label=0"
    for method, accept in (("GET", "application/zip"), ("POST", "application/zip"), ("POST", "application/json")):
        response = site.client.request(method, query, headers={"Accept": accept})
        assert (response.status_code, response.headers["content-type"]) == (200, accept)
        if accept == "application/zip":
            with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
                images = [pixels(archive.read(name)) for name in archive.namelist()]
        else:
            assert response.json()["spec"]["seed"] == 5
            images = [pixels(base64.b64decode(each["png"])) for each in response.json()["images"]]
        np.testing.assert_array_equal(np.stack(images), expected)


def test_no_parameters_at_all_make_one_image_as_recommended_and_the_answer_says_so(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, recommended=Recommended("ddim", 10, 1.5)))
    first, second = site.post(), site.client.get("/sample")
    assert first.status_code == second.status_code == 200
    assert site.engine.batches[-1].steps == (9,)
    told = {name: first.headers[name] for name in ("x-sampler", "x-steps", "x-guidance")}
    assert told == {"x-sampler": "ddim", "x-steps": "10", "x-guidance": "1.0"}
    assert site.post(json={"class_label": "cat"}).headers["x-guidance"] == "1.5"
    assert 0 <= int(first.headers["x-seed"]) < 2**53
    assert first.headers["x-seed"] != second.headers["x-seed"]
    assert first.headers["x-job-id"] != second.headers["x-job-id"]


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


# --- guidance interval and timestep spacing ---


def test_guidance_takes_its_second_place_inside_the_interval_only(site: Site) -> None:
    before = len(site.engine.batches)
    site.post(json={"steps": 10, "seed": 5} | GUIDED | {"guidance_interval": [300, 600]})
    places = [batch.places for batch in site.engine.batches[before:]]
    assert places == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1], "t = 900, 800, ... 0"


# --- load and the end ---


def test_a_draining_server_refuses_new_work_and_answers_the_old(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        site.worker.drain()
        for response in (site.post(json=QUICK), site.client.get("/readyz")):
            problem(response, 503, "draining")
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["connection"] == "close"
        assert site.client.get("/healthz").status_code == 200
        site.engine.gate.open()
        answer = running.result(PATIENCE_S)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_work_given_up_at_the_end_of_the_grace_period_is_told_so(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        closing = pool.submit(site.worker.close)
        wait_until(lambda: not site.worker.state.alive)
        site.engine.gate.let()
        problem(running.result(PATIENCE_S), 503, "draining")
        closing.result(PATIENCE_S)


def test_a_spec_the_engine_refuses_is_a_422(site: Site) -> None:
    def refuse(_spec: SampleSpec) -> None:
        raise ValueError("not with this schedule")

    site.engine.on_add = refuse
    assert problem(site.post(json=QUICK), 422, "invalid_field")["field"] == "sampler"


# --- a client that goes away ---


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
    assert metrics['tminus_jobs_aborted_total{"reason": "client_gone"}'] == 1
    assert metrics["tminus_row_steps_saved_total"] == 4 * 1000 - 4
    assert metrics["tminus_backlog_seconds"] == 0
    assert metrics['tminus_request_duration_seconds_count{"route": "/sample", "status": "499"}'] == 1
    assert not any(name.startswith("tminus_rejected_total") for name in metrics)


def test_a_client_that_goes_away_within_its_body_is_no_error_of_ours(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    call(site.app, iter([{"type": "http.request", "body": b'{"steps"', "more_body": True}]))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert site.post(json=QUICK).status_code == 200


# --- animations ---


def test_the_way_to_the_images_is_had_as_json_with_timesteps(site: Site) -> None:
    asked = SPEC | {"every": 2, "show": ["x_0", "x_t"]}
    answer = site.post(json=asked, headers=AS_JSON)
    way, plain = answer.json(), site.post(json=SPEC, headers=AS_JSON).json()
    assert {name: way[name] for name in plain} == plain
    assert base64.b64decode(way["sheet"]) == site.post(json=SPEC).content
    steps = [frame["step"] for frame in way["frames"]]
    assert steps == list(range(0, SPEC["steps"], 2)), "from the noise on"
    with site.client.websocket_connect("/sample/stream") as ws:
        ws.send_json(SPEC | {"every": 2})
        told = {}
        while (message := ws.receive()).get("type") != "websocket.close":
            if "text" in message and (document := json.loads(message["text"]))["type"] == "frame":
                told[document["step"]] = document["t"]
    assert told
    assert {frame["step"]: frame["t"] for frame in way["frames"]}.items() >= told.items()
    for frame in way["frames"]:
        shown = contact_sheet(fake_pixels(make_spec(n=2, seed=4), frame["step"]))[:, :, 0]
        np.testing.assert_array_equal(pixels(base64.b64decode(frame["x_t"])), shown)
        np.testing.assert_array_equal(pixels(base64.b64decode(frame["x_0"])), 255 - shown)
    other = site.post(json=SPEC | {"every": 2, "show": "x_t"}, headers=AS_JSON)
    assert "x_0" not in other.json()["frames"][0]
    assert other.headers["etag"] != answer.headers["etag"]
    known = site.post(json=asked, headers=AS_JSON | {"If-None-Match": answer.headers["etag"]})
    assert known.status_code == 412


@pytest.mark.parametrize("show", ["x_t", "x_0"])
def test_an_animation_shows_every_so_many_steps_and_the_result(site: Site, show: str) -> None:
    response = site.post(json=SPEC | {"every": 3, "show": show}, headers=WEBP)
    frames, durations = frames_of(response.content)
    assert durations == [FRAME_MS] * 3 + [LAST_MS]
    for frame, step in zip(frames, (3, 6, 9, 10), strict=True):
        shown = contact_sheet(fake_pixels(make_spec(n=2, seed=4), step))[:, :, 0]
        np.testing.assert_array_equal(frame, shown if show == "x_t" or step == 10 else 255 - shown)


@pytest.mark.parametrize("until", [0, 4])
def test_the_beginning_of_a_way_costs_no_more_than_its_steps(make_site: MakeSite, until: int) -> None:
    site = make_site()
    asked = SPEC | {"every": 1, "show": ["x_0", "x_t"]}
    beginning = site.post(json=asked | {"until": until}, headers=AS_JSON).json()
    taken = sum(len(batch.rows) for batch in site.engine.batches[1:])  # the first is the warm-up's
    assert taken == SPEC["n"] * max(1, until)
    whole = site.post(json=asked, headers=AS_JSON).json()
    assert beginning["frames"] == whole["frames"][: until + 1]
    assert beginning["images"] == []
    assert "sheet" not in beginning
    assert {name: beginning[name] for name in ("spec", "fingerprint")} == {
        name: whole[name] for name in ("spec", "fingerprint")
    }
    assert not site.engine.jobs


def test_a_frame_that_cannot_be_read_fails_its_own_job_only(site: Site) -> None:
    def fail(_rows: object) -> None:
        raise RuntimeError("out of memory")

    site.engine.on_preview = fail
    problem(site.post(json=SPEC | {"every": 2}, headers=WEBP), 500, "engine_failed")
    site.engine.on_preview = lambda rows: None
    assert site.post(json=SPEC | {"every": 2}, headers=WEBP).status_code == 200


def test_too_many_frames_are_refused_with_an_every_that_would_fit(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, height_px=256, width_px=256))
    most = MAX_FRAME_BYTES // (8 * 256 * 256)
    body = {"n": 8, "steps": 100}
    document = problem(site.post(json=body | {"every": 1}, headers=WEBP), 422, "invalid_field")
    least = -(-100 // most)
    assert document["bound"] == f"at least {least} for this number of images and steps"
    assert site.post(json=body | {"every": least}, headers=WEBP).status_code == 200


# --- trajectories ---


def walked(site: Site, **given: Any) -> dict[str, Any]:
    """The arrays of a trajectory."""
    response = site.post(json=SPEC | given, headers=AS_TRAJECTORY)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == TRAJECTORY
    return dict(read_trajectory(response.content).arrays)


def test_a_trajectory_has_every_step_and_the_images_of_the_other_answers(site: Site) -> None:
    spec = make_spec(n=2, steps=10, seed=4)
    arrays = walked(site)
    for step, x in enumerate(arrays["x_t"]):
        np.testing.assert_array_equal(x, fake_pixels(spec, step).transpose(0, 3, 1, 2))
    assert arrays["passes"].tolist() == list(range(9))
    assert arrays["log_p"].shape == (9, 2)
    np.testing.assert_array_equal(contact_sheet(arrays["images"])[:, :, 0], pixels(site.post(json=SPEC).content))


def test_every_request_whose_steps_add_noise_has_a_trajectory(site: Site) -> None:
    for given in (
        {"sampler": "ddim", "eta": LEAST_ETA},
        {"sampler": "dpmpp_2m_sde", "guidance": 2, "guidance_interval": [100, 500]},
        {"image": b64(CAT), "strength": 0.5},
    ):
        arrays = walked(site, **given)
        assert len(arrays["x_t"]) == 1 + len(arrays["timesteps"]) == (6 if "image" in given else 11)


def test_a_trajectory_that_would_be_too_large_is_refused_with_what_would_fit(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, height_px=64, width_px=64))
    image_bytes = 64 * 64 * (4 * (101 + 100 + 99) + 1)
    most = MAX_TRAJECTORY_BYTES // image_bytes
    assert 1 < most < 64
    document = problem(site.post(json={"n": most + 1, "steps": 100}, headers=AS_TRAJECTORY), 422, "invalid_field")
    assert (document["field"], document["bound"]) == (
        "n",
        f"1..{most} with Accept: {TRAJECTORY}, for this number of steps",
    )
    whole = site.post(json={"n": most, "steps": 100}, headers=AS_TRAJECTORY)
    assert most * image_bytes < len(whole.content) < most * image_bytes + 20_000, "the bound counts what is sent"
    large = make_site(info=replace(INFO, height_px=512, width_px=512))
    asked = {"sampler": "ddpm", "steps": 1000}
    assert problem(large.post(json=asked, headers=AS_TRAJECTORY), 422, "invalid_field")["field"] == "steps"


def test_parts_of_a_trajectory_are_other_answers_that_are_kept_apart(site: Site) -> None:
    asked: tuple[dict[str, Any], ...] = ({}, {"keep": [1, 2]}, {"keep": [1, 3]}, {"dtype": "float16"})
    answers = [site.post(json=SPEC | given, headers=AS_TRAJECTORY) for given in asked]
    assert len({each.content for each in answers}) == len(asked)
    assert [read_trajectory(each.content).arrays["x_t"].dtype for each in answers[2:]] == [np.float32, np.float16]
    query = SPEC | {"keep": [1, 3]}
    assert site.client.get("/sample", params=query, headers=AS_TRAJECTORY).content == answers[2].content
    alone = site.client.get("/sample", params=query | {"keep": 3}, headers=AS_TRAJECTORY)
    assert read_trajectory(alone.content).arrays["x_t_at"].tolist() == [3, 4]


def test_more_images_and_steps_fit_where_less_is_kept(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, height_px=64, width_px=64))
    body = {"n": 16, "steps": 1000, "sampler": "ddpm"}
    assert problem(site.post(json=body, headers=AS_TRAJECTORY), 422, "invalid_field")["field"] == "steps"
    image_bytes = 64 * 64 * (2 * (5 + 3 + 3) + 1)
    part = site.post(json=body | {"keep": [0, 500, 501], "dtype": "float16"}, headers=AS_TRAJECTORY)
    plan_bytes = 1000 * 8 * (8 + 2 + 1)
    assert 16 * image_bytes < len(part.content) - plan_bytes < 16 * image_bytes + 20_000, (
        "the bound counts what is sent"
    )
    large = make_site(info=replace(INFO, height_px=2048, width_px=2048))
    asked = {"sampler": "ddpm", "steps": 10, "keep": list(range(9))}
    assert problem(large.post(json=asked, headers=AS_TRAJECTORY), 422, "invalid_field")["field"] == "keep"


def test_trajectories_over_the_room_are_refused_and_those_that_end_leave_room(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, height_px=64, width_px=64), max_jobs=64)
    body = {"n": 6, "steps": 100, "class_label": 0}
    site.engine.gate.shut()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(site.post, json=body | {"seed": k}, headers=AS_TRAJECTORY) for k in range(8)]
        wait_until(lambda: sum(each.done() for each in asked) >= 5)
        refused = [problem(each.result(), 429, "overloaded") for each in asked if each.done()]
        assert {document["field"] for document in refused} == {"n"}
        site.engine.gate.open()
        assert {each.result(PATIENCE_S).status_code for each in asked} == {200, 429}
    assert site.post(json=body, headers=AS_TRAJECTORY).status_code == 200


# --- edits ---


def test_only_the_steps_that_are_left_are_taken(site: Site) -> None:
    site.post(json=EDIT | {"strength": 0.4, "image": b64(CAT)})
    assert [set(batch.steps) for batch in site.engine.batches[-2:]] == [{3}, {4}]
    assert same(got(site))
    site.post(json=EDIT | {"image": b64(CAT), "mask": b64(MASK)})
    assert [set(batch.steps) for batch in site.engine.batches[-5:]] == [{0}, {1}, {2}, {3}, {4}]


def test_another_image_mask_or_strength_is_another_answer(site: Site) -> None:
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    others = [
        {},
        {"image": b64(encode(noise(4, 6, seed=1)))},
        {"mask": b64(encode(255 - noise(4, 6, seed=2)))},
        {"strength": 0.61},
        {"mask": None},
        {"strength": None},
    ]
    tags = [site.post(json=body | other).headers["etag"] for other in others]
    assert len(set(tags)) == len(tags)
    jpeg = site.post(json=body | {"image": b64(encode(PICTURE, "WEBP", lossless=True), "image/webp")})
    assert jpeg.headers["etag"] == tags[0], "it is the pixels that count"
    again = site.client.post("/sample", json=body, headers={"If-None-Match": tags[0]})
    assert again.status_code == 412


def test_a_deadline_is_held_against_the_steps_that_are_left(make_site: MakeSite) -> None:
    site = make_site(tick_times=((1, 1.0), (LIMITS.max_batch, 1.0)))
    body = {"steps": 100, "deadline_s": 20, "image": b64(CAT)}
    assert problem(site.post(json=body | {"strength": 0.3}), 422, "invalid_field")["field"] == "deadline_s"
    answer = site.post(json=body | {"strength": 0.2})
    assert answer.status_code == 200
    assert float(answer.headers["x-eta-seconds"]) == 20.0


def test_a_deadline_is_answered_though_a_step_hangs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LATE_S", 0.1)
    site.engine.gate.shut()
    document = problem(site.post(json={"steps": 5, "deadline_s": 0.3}), 504, "deadline_passed")
    assert document["value"] == 0.3
    site.engine.gate.open()


# --- what a client is warned of ---


def test_a_client_is_warned_exactly_where_noise_is_taken_for_an_image() -> None:
    for sampler, spacing, steps in product(INFO.samplers, SPACINGS, (1, 2, 10)):
        spec = make_spec(sampler=sampler, timestep_spacing=spacing, steps=steps)
        expected = steps == 1 and not SAMPLER_FACTS[sampler].leaves_out_cleanest and spacing in ("leading", "linspace")
        warning = warning_of(spec, INFO)
        assert (warning is not None) == expected == (timesteps_of(spec, INFO)[0] == 0)
        assert warning is None or "timestep_spacing=trailing" in warning


def test_the_warning_is_in_a_header_of_images_and_of_jobs(site: Site) -> None:
    one, two = {"steps": 1, "seed": 5}, {"steps": 2, "seed": 5}
    for answer in (site.post(json=one), site.client.get("/sample", params=one), site.client.post("/jobs", json=one)):
        assert "timestep 0" in answer.headers["x-warning"]
    same = site.client.get("/sample", params=one, headers={"If-None-Match": site.post(json=one).headers["etag"]})
    assert (same.status_code, "x-warning" in same.headers) == (304, True)
    for answer in (
        site.post(json=two),
        site.client.post("/jobs", json=two),
        site.post(json=one | {"timestep_spacing": "trailing"}),
        site.post(json=EDIT | {"steps": 1, "strength": 1, "image": b64(CAT)}),
    ):
        assert answer.is_success
        assert "x-warning" not in answer.headers
    path = site.client.post("/jobs", json=one).headers["location"]
    wait_until(lambda: site.client.get(path).json()["state"] == "done")
    assert "timestep 0" in site.client.get(f"{path}/image").headers["x-warning"]
