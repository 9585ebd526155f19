"""GET /batch, through the app on a fake engine: who is told what of the jobs that run."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO, make_spec, wait_until
from tests.service.keys import access_of, bearer, key_line
from tminus.service.api import batch as batch_module
from tminus.service.work import timesteps_of

ANN, BEN, OPS = "tm_ann", "tm_ben", "tm_ops"
LINES = key_line("ann", ANN), key_line("ben", BEN), key_line("ops", OPS, "admin")


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "FRESH_S", 0.0)


def look(site: Site, secret: str | None = None) -> dict[str, Any]:
    answer = site.client.get("/batch", headers=bearer(secret) if secret else {})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_idle_server_has_an_empty_batch(site: Site) -> None:
    assert look(site) == {"max_batch": site.client.get("/model").json()["limits"]["max_batch"], "rows_active": 0,
                          "jobs": [], "more": 0}  # fmt: skip
    assert problem(site.client.get("/batch?n=1"), 422, "unknown_field")["field"] == "n"


def test_each_job_is_told_with_its_rows_its_step_and_its_timestep(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        asked = {"n": 3, "steps": 20, "seed": 5}
        answer = pool.submit(site.post, json=asked)
        site.engine.next_begun()
        site.engine.gate.let()
        site.engine.next_begun()
        wait_until(lambda: look(site)["jobs"][0]["step"] == 1)
        now = look(site)
        (job,) = now["jobs"]
        timesteps = timesteps_of(make_spec(**asked), INFO)
        assert (job["n"], job["steps"], job["state"], job["seed"]) == (3, 20, "running", 5)
        assert (job["t"], job["num_timesteps"], job["model"]) == (timesteps[1], INFO.num_timesteps, INFO.name)
        assert (job["position"], job["yours"]) == (0, True)
        assert job["eta_s"] >= 0
        assert now["rows_active"] == 3
        site.engine.gate.open()
        assert answer.result().status_code == 200
    wait_until(lambda: look(site)["jobs"] == [])


def test_of_the_jobs_of_others_a_caller_is_told_no_names(make_site: MakeSite) -> None:
    site = make_site(app={"access": access_of(*LINES)})
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        for secret, seed in ((ANN, 1), (BEN, 2)):
            pool.submit(site.post, json={"steps": 20, "seed": seed}, headers=bearer(secret))
            wait_until(lambda seed=seed: len(look(site, OPS)["jobs"]) == seed)  # type: ignore[misc]
        ann, ben, ops = (look(site, secret)["jobs"] for secret in (ANN, BEN, OPS))
        assert [(job["yours"], job["seed"]) for job in ann] == [(True, 1), (False, None)]
        assert [(job["yours"], job["seed"]) for job in ben] == [(False, None), (True, 2)]
        assert [(job["yours"], job["seed"]) for job in ops] == [(False, 1), (False, 2)]
        assert ann[1]["id"] is None
        assert ben[0]["id"] is None
        assert None not in [job["id"] for job in ops]
        numbers = [[job["number"] for job in jobs] for jobs in (ann, ben, ops)]
        assert numbers == [[1, 2]] * 3, "the same for all"
        site.engine.gate.open()
    problem(site.client.get("/batch"), 401, "unauthorized")


def test_many_who_look_at_once_cost_one_look(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "FRESH_S", 3600.0)
    assert look(site)["jobs"] == []
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(site.post, json={"steps": 20})
        wait_until(lambda: site.client.get("/jobs").json()["jobs"] != [])
        assert look(site)["jobs"] == [], "as it was an hour ago at most"
        site.engine.gate.open()


def test_the_jobs_and_how_many_more_there_are_come_of_one_look(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "MOST_JOBS", 2)
    site.engine.gate.shut()
    with ThreadPoolExecutor(3) as pool:
        for seed in range(3):
            pool.submit(site.post, json={"steps": 20, "seed": seed})
        wait_until(lambda: look(site)["more"] == 1)
        monkeypatch.setattr(batch_module, "FRESH_S", 3600.0)
        site.engine.gate.open()
    wait_until(lambda: site.client.get("/jobs").json()["jobs"] == [])
    assert (len(look(site)["jobs"]), look(site)["more"]) == (2, 1)
