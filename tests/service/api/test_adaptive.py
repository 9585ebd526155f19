"""`quality=adaptive`: what it chooses, and where the answer tells it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.service.api.kserve.requests import tensor
from tests.service.api.openai.asking import generate
from tests.service.conftest import INSTANT, TABLES_OF_50, MakeSite, Site, prepare, problem
from tests.service.durable import wait_for
from tests.service.fakes import INFO, LIMITS, FakeEngine
from tminus.model.catalogue import Rung

SLOW = ((1, 0.1), (LIMITS.max_batch, 0.1))  # as the forecast has it: the ladder takes 2, 1 and 0.5 s
ADAPTIVE: dict[str, Any] = {"class_label": 0, "seed": 5, "quality": "adaptive"}
STUDENT = replace(
    INFO,
    name="student",
    samplers=("consistency",),
    default_sampler="consistency",
    tables=(replace(TABLES_OF_50[0], sampler="consistency", steps=1, guidance=1.0),),
    ladder=(Rung("consistency", 1),),
    weights_hash="cd" * 32,
    fingerprint="fedcba9876543210",
)
FAMILY = replace(INFO, ladder=(*INFO.ladder, Rung("tuned", 2), Rung("consistency", 1, model="student")))


@pytest.fixture
def slow(make_site: MakeSite) -> Site:
    """Its ticks are faster than the forecast has it, which the forecast learns: ask it for one choice."""
    return make_site(tick_times=SLOW)


def family(make_site: MakeSite, **changes: Any) -> Site:
    student = prepare(FakeEngine(replace(STUDENT, **changes)), LIMITS, SLOW)
    return make_site(info=FAMILY, tick_times=SLOW, app={"others": [student]})


@pytest.mark.parametrize(("deadline_s", "steps"), [(86_400, 20), (2.5, 20), (1.5, 10), (0.7, 5), (None, 20)])
def test_the_answer_is_that_of_the_setting_and_tells_it(slow: Site, deadline_s: float | None, steps: int) -> None:
    place = f"{[20, 10, 5].index(steps) + 1}/3"
    answer = slow.post(json=ADAPTIVE | ({} if deadline_s is None else {"deadline_s": deadline_s}))
    headers = answer.headers
    assert (answer.status_code, headers["x-sampler"], headers["x-steps"]) == (200, "dpmpp_2m", str(steps))
    assert headers["x-quality"] == place
    named = slow.post(json={"class_label": 0, "seed": 5, "sampler": "dpmpp_2m", "steps": steps})
    assert (named.content, named.headers["etag"]) == (answer.content, headers["etag"])
    assert named.headers["x-quality"] == place
    assert slow.metrics()[f'tminus_quality_total{{"model": "fake", "rung": "{place}"}}'] >= 1


def test_a_setting_beside_the_ladder_has_no_place_in_it(slow: Site) -> None:
    for other in ({"steps": 7}, {"timestep_spacing": "linspace"}, {"sampler": "ddim"}):
        named = {"sampler": "dpmpp_2m", "steps": 20} | other
        assert "x-quality" not in slow.post(json={"class_label": 0, **named}).headers, other


def test_parameters_of_a_setting_are_refused_and_both_are_named(slow: Site) -> None:
    given = {
        "steps": 5, "sampler": "ddim", "guidance": 2, "eta": 0.5, "table": "0" * 16, "nearest": True,
        "timestep_spacing": "karras", "guidance_interval": [0, 9], "guidance_rescale": 0.5,
    }  # fmt: skip
    for name, value in given.items():
        wrong = problem(slow.post(json=ADAPTIVE | {"deadline_s": 9, name: value}), 422, "invalid_field")
        assert (wrong["field"], "quality=adaptive" in wrong["bound"]) == (name, True)
    wrong = problem(slow.post(json=ADAPTIVE | {"deadline_s": 9, "steps": 5, "sampler": "ddim"}), 422, "invalid_field")
    assert {each["field"] for each in wrong["errors"]} == {"steps", "sampler"}
    wrong = problem(slow.post(json={"quality": "best"}), 422, "invalid_field")
    assert (wrong["field"], wrong["bound"]) == ("quality", "adaptive")


def test_a_deadline_below_the_fastest_setting_is_refused_with_its_time(slow: Site) -> None:
    wrong = problem(slow.post(json=ADAPTIVE | {"deadline_s": 0.001}), 422, "invalid_field")
    assert wrong["field"] == "deadline_s"
    assert 0.3 < float(wrong["bound"].split()[2]) <= 0.5, "five steps"


def test_a_rung_of_another_model_is_its_answer_and_one_without_a_table_is_left_out(make_site: MakeSite) -> None:
    site = family(make_site)
    answer = site.post(json=ADAPTIVE | {"deadline_s": 0.3})
    assert (answer.status_code, answer.headers["x-sampler"]) == (200, "consistency"), "tuned has no table"
    assert answer.headers["x-quality"] == "5/5"
    assert answer.headers["x-fingerprint"] == STUDENT.fingerprint
    named = site.client.post("/models/student/sample", json={"class_label": 0, "seed": 5, "steps": 1})
    assert (named.content, named.headers["etag"]) == (answer.content, answer.headers["etag"])
    ladder = site.client.get("/model").json()["ladder"]
    assert [(rung["model"], rung["passes"]) for rung in ladder] == [
        (None, 20), (None, 10), (None, 5), (None, 2), ("student", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"width_px": 8}, {"class_names": ("dog", "cat", "3d-print")}, {"name": "other"}])
def test_a_model_that_is_not_there_or_makes_other_images_is_left_out(
    make_site: MakeSite, changes: dict[str, Any]
) -> None:
    problem(family(make_site, **changes).post(json=ADAPTIVE | {"deadline_s": 0.3}), 422, "invalid_field")


def test_a_durable_job_has_a_setting_and_a_repeated_request_is_the_same_job(make_site: MakeSite) -> None:
    site = family(make_site)

    def submit(deadline_s: float, **given: Any) -> Any:
        headers = {"Idempotency-Key": f"key-{deadline_s}"}
        return site.client.post("/jobs", json=ADAPTIVE | {"deadline_s": deadline_s} | given, headers=headers)

    for deadline_s, model, steps, place in ((1.5, "fake", 10, "2/5"), (0.3, "student", 1, "5/5")):
        answer = submit(deadline_s)
        job = answer.json()
        assert (answer.status_code, answer.headers["x-quality"], job["model"]) == (202, place, model)
        assert job["parameters"]["steps"] == steps
        assert wait_for(site, job["id"])["state"] == "done"
        again = submit(deadline_s)
        assert (again.json()["id"], again.headers["idempotent-replayed"]) == (job["id"], "true")
        problem(submit(deadline_s, n=2), 422, "idempotency_key_reused")
        image = site.client.get(f"/jobs/{job['id']}/image")
        assert (image.status_code, image.headers["x-quality"]) == (200, place)


def test_many_at_once_share_what_there_is(make_site: MakeSite) -> None:
    site = make_site(tick_times=SLOW, max_jobs=300, max_rows=1000)
    with ThreadPoolExecutor(32) as pool:
        jobs = list(
            pool.map(lambda k: site.client.post("/jobs", json=ADAPTIVE | {"seed": k, "deadline_s": 30}), range(64))
        )
    assert {job.status_code for job in jobs} <= {202, 429}
    ids = [job.json()["id"] for job in jobs if job.status_code == 202]
    assert len(ids) == len({*ids}) >= 1
    assert {wait_for(site, job_id)["state"] for job_id in ids} == {"done"}


def from_stream(site: Site) -> str:
    with site.client.websocket_connect("/sample/stream") as stream:
        stream.send_text(json.dumps(ADAPTIVE | {"deadline_s": 1.5, "every": 1000}))
        accepted, done = (json.loads(stream.receive_text()) for _ in range(2))
        assert (done["type"], done["images"], len(stream.receive_bytes()) > 0) == ("done", 1, True)
    return str(accepted["quality"])


def from_hugging_face(site: Site) -> str:
    call = {"inputs": "cat", "parameters": {"quality": "adaptive", "deadline_s": 1.5}}
    return str(site.client.post("/", json=call).headers["x-quality"])


def from_kserve(site: Site) -> str:
    call = {"inputs": [tensor("seed", "UINT64", 7)], "parameters": {"quality": "adaptive", "deadline_s": 1.5}}
    return str(site.client.post("/v2/models/fake/infer", json=call).headers["x-quality"])


def from_openai(site: Site) -> str:
    answer = generate(site, prompt="cat", deadline_s=1.5)
    assert answer.json()["quality"] == "medium"
    return str(answer.headers["x-quality"])


def from_a_frame(site: Site) -> str:
    call = ADAPTIVE | {"deadline_s": 1.5, "every": 2}
    return str(site.post(json=call, headers={"Accept": "application/json"}).headers["x-quality"])


@pytest.mark.parametrize("door", [from_stream, from_hugging_face, from_kserve, from_openai, from_a_frame])
def test_every_door_takes_it(slow: Site, door: Callable[[Site], str]) -> None:
    assert door(slow) == "2/3"


def test_another_ladder_after_a_reload_counts_at_once(make_site: MakeSite) -> None:
    site = make_site(tick_times=INSTANT, info=replace(INFO, ladder=(Rung("dpmpp_2m", 3),)))
    assert site.post(json=ADAPTIVE | {"deadline_s": 9}).headers["x-quality"] == "1/1"
