"""sampler=tuned: which table a request takes, and what is told where there is none."""

from dataclasses import replace
from typing import Any

import pytest

from tests.service.conftest import MakeSite, Restarts, Site, make_site, problem  # noqa: F401
from tests.service.durable import post, wait_for
from tests.service.fakes import INFO, LIMITS, wait_until
from tminus.model.catalogue import SAMPLERS, TABLE, Recommended
from tminus.model.sampler_tables import Table
from tminus.service.api.request import specs
from tminus.service.api.request.schemas import SampleRequest, bounds_of
from tminus.service.api.request.specs import choose_table, parameters_of
from tminus.service.errors import InvalidField
from tminus.service.spec import SampleSpec
from tminus.service.work import timesteps_of, work_of


def table(steps: int, guidance: float = 1.0, sampler: str = "tuned") -> Table:
    timesteps = tuple(999.0 - 100.5 * k for k in range(steps))
    return Table(sampler, steps, guidance, timesteps, ((0.5, 0.5, 0.1, 0.0, 0.0),) * steps)


def other_than(one: Table) -> Table:
    """Of the same steps and guidance, with other coefficients: as after another `tminus tune`."""
    return replace(one, lines=((0.4, 0.6, 0.1, 0.0, 0.0),) * one.steps)


TABLES = (table(5), table(8), table(5, 2.0), table(6, 1.5))
TUNED = replace(
    INFO,
    samplers=(*SAMPLERS, "tuned"),
    tables=TABLES,
    timestep_spacings={**INFO.timestep_spacings, "tuned": TABLE},
    refused_tables=("samplers/tuned-4.json: steps must be an integer in 1..1000, got 0",),
)
THERE = "5, 8 steps at guidance 1; 6 steps at guidance 1.5; 5 steps at guidance 2"
NONE = f"one that tuned has a table for, or nearest=true: {THERE}"
OWN = "absent for sampler tuned: its table has the timesteps"


@pytest.fixture
def tuned(make_site: MakeSite) -> Site:  # noqa: F811
    return make_site(info=TUNED)


def spec_of(**parameters: Any) -> SampleSpec:
    asked = SampleRequest.parse({"sampler": "tuned", **parameters}, bounds_of(TUNED, LIMITS))
    return specs.spec_of(asked, TUNED, LIMITS)


def test_a_request_takes_the_table_of_its_steps_and_guidance() -> None:
    asked: list[tuple[dict[str, Any], Table]] = [
        ({"steps": 5}, table(5)),
        ({"steps": 5, "guidance": 2, "class_label": 0}, table(5, 2.0)),
        ({"steps": 7, "nearest": True}, table(8)),
        ({"steps": 8, "nearest": True, "guidance": 1.6, "class_label": 0}, table(6, 1.5)),
        ({}, table(8)),
        ({"steps": 8, "table": table(8).hash}, table(8)),
    ]
    for parameters, expected in asked:
        spec = spec_of(**parameters)
        assert (spec.steps, spec.guidance, spec.table) == (expected.steps, expected.guidance, expected.hash)
        assert list(timesteps_of(spec, TUNED)) == list(expected.timesteps)
        assert work_of(spec, TUNED).places == expected.steps * (2 if expected.guidance != 1 else 1)
        again = specs.spec_of(SampleRequest.parse(parameters_of(spec), bounds_of(TUNED, LIMITS)), TUNED, LIMITS)
        assert again == spec, "the parameters that a job is listed with, and that a PNG has, make it again"


def test_guided_tables_are_not_taken_for_unguided_requests_nor_the_other_way() -> None:
    only_guided = replace(TUNED, tables=(table(6, 1.5),))
    with pytest.raises(
        InvalidField, match=r"guidance must be one that tuned has a table for: 6 steps at guidance 1\.5"
    ):
        choose_table(only_guided, Recommended("tuned", 6), take_nearest=True)


def test_tables_and_what_is_not_used_are_told(tuned: Site) -> None:
    answer = tuned.client.get("/model").json()
    assert answer["samplers"][-1] == "tuned"
    assert answer["sampler_details"]["tuned"]["good_steps"] == 8
    assert [(each["steps"], each["guidance"], each["table"]) for each in answer["tables"]] == [
        (each.steps, each.guidance, each.hash) for each in TABLES
    ]
    assert answer["refused_tables"] == list(TUNED.refused_tables)


def test_a_tuned_request_is_answered_over_http(tuned: Site) -> None:
    answer = tuned.post(json={"sampler": "tuned", "steps": 8, "seed": 1}, headers={"Accept": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["spec"]["table"] == table(8).hash
    refused = problem(tuned.post(json={"sampler": "tuned", "steps": 7}), 422, "invalid_field")
    assert THERE in refused["bound"]


TUNED_FIELDS = {name: getattr(TUNED, name) for name in ("samplers", "tables", "timestep_spacings")}
RETUNED = TUNED_FIELDS | {"tables": tuple(map(other_than, TABLES)), "fingerprint": "another build"}
ASKED = {"sampler": "tuned", "steps": 5, "n": 2, "seed": 7, "class_label": 1}


def test_images_that_were_made_by_a_table_are_there_after_another_tune(restarts: Restarts) -> None:
    site = restarts.start(info=TUNED_FIELDS)
    job_id = post(site, ASKED, **{"Idempotency-Key": "k"}).json()["id"]
    wait_for(site, job_id)
    image = site.client.get(f"/jobs/{job_id}/image").content
    restarts.stop()
    site = restarts.start(info=RETUNED)
    answer = site.client.get(f"/jobs/{job_id}/image")
    assert (answer.status_code, answer.content) == (200, image)
    assert site.client.get(f"/jobs/{job_id}").json()["state"] == "done"
    assert "event: done" in site.client.get(f"/jobs/{job_id}/events").text


def test_a_job_whose_table_has_gone_fails_and_says_so(restarts: Restarts) -> None:
    interval = {"guidance": 2.0, "guidance_interval": [100, 900]}
    site = restarts.start(shut=True, info=TUNED_FIELDS)
    job_id = post(site, ASKED | interval).json()["id"]
    restarts.stop()
    site = restarts.start(info=RETUNED)
    wait_until(lambda: site.client.get(f"/jobs/{job_id}").json()["state"] == "failed")
    document = site.client.get(f"/jobs/{job_id}").json()["problem"]
    assert (document["status"], document["code"], document["field"]) == (422, "invalid_field", "table")
    assert site.client.get("/batch").json()["jobs"] == []
    assert "event: failed" in site.client.get(f"/jobs/{job_id}/events").text
