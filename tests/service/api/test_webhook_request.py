"""Webhooks as clients name them, through the app, with a real receiver."""

from typing import Any

import pytest

from tests.receivers import receiver, status
from tests.service.api.pictures import CAT
from tests.service.conftest import MakeSite, Site, problem
from tests.service.durable import SPEC, post, wait_for
from tests.service.fakes import wait_until
from tests.service.keys import access_of, bearer, key_line
from tests.service.webhooks import make_telling
from tminus.service.jobs.webhooks import deliverer

TOKEN = "?token=s3cret"
EVERY = ["start", "output", "completed"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliverer, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(deliverer, "POLL_INTERVAL_S", 0.05)


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_telling(make_site)


def webhook_of(site: Site, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = site.client.get(f"/jobs/{job_id}").json()["webhook"]
    return found


def settled(site: Site, job_id: str, count: int) -> list[dict[str, Any]]:
    """The deliveries, once there are so many and none is pending."""

    def all_settled() -> bool:
        found = webhook_of(site, job_id)["deliveries"]
        return len(found) == count and all(each["state"] != "pending" for each in found)

    wait_until(all_settled)
    found: list[dict[str, Any]] = webhook_of(site, job_id)["deliveries"]
    return found


def test_start_output_and_completed_are_told_with_the_jobs_document(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.engine.gate.shut()
    with receiver() as there, caplog.at_level("DEBUG"):
        accepted = post(site, {**SPEC, "webhook": f"{there.url}/hook{TOKEN}"})
        job_id = accepted.json()["id"]
        assert accepted.json()["webhook"] == {"receiver": there.url, "events": EVERY, "deliveries": []}
        site.engine.next_begun()
        assert there.told == []
        site.engine.gate.let(2)  # the watch may come to the worker while the first runs
        (start,) = there.wait_for(1)
        assert (start.event, start.document["state"], start.document["id"]) == ("start", "running", job_id)
        site.engine.gate.open()
        told = there.wait_for(3)
        assert sorted(each.event for each in told) == sorted(EVERY)
        found = settled(site, job_id, 3)
        assert [(each["event"], each["state"], each["attempts"], each["error"]) for each in found] == [
            (event, "delivered", 1, None) for event in EVERY
        ]
        assert {each["id"] for each in found} == {*there.ids()}
        done = site.client.get(f"/jobs/{job_id}").json()
        for each in told[1:]:
            assert each.path == f"/hook{TOKEN}"
            assert each.document | {"age_s": 0, "webhook": 0} == done | {"age_s": 0, "webhook": 0}
        assert there.refused == []
    (listed,) = site.client.get("/jobs").json()["jobs"]
    assert listed["webhook"]["deliveries"] == found
    assert "s3cret" not in site.client.get("/jobs").text + caplog.text
    metrics = site.metrics()
    assert metrics['tminus_webhook_events_total{"outcome": "delivered"}'] == 3


def test_a_job_that_fails_or_is_cancelled_is_told_to_have_ended(site: Site) -> None:
    site.engine.gate.shut()
    with receiver() as there:
        failing = post(site, {**SPEC, "webhook": there.url}).json()["id"]
        batch = site.engine.next_begun()
        site.engine.gate.let(2)
        there.wait_for(1)
        site.engine.nan.add(batch.rows[0])
        site.engine.gate.open()
        assert [each["event"] for each in settled(site, failing, 2)] == ["start", "completed"]
        site.engine.gate.shut()
        cancelled = post(site, {**SPEC, "webhook": there.url}).json()["id"]
        site.engine.next_begun()
        site.engine.gate.open()
        answer = site.client.post(f"/jobs/{cancelled}/cancel").json()
        settled(site, cancelled, len(webhook_of(site, cancelled)["deliveries"]))
        ends = {each.document["id"]: each.document for each in there.told if each.event == "completed"}
    assert ends[failing]["problem"]["code"] == "not_finite"
    assert ends[failing]["state"] == "failed"
    assert ends[cancelled]["state"] == answer["state"]


def test_a_form_names_one_too_and_the_events_it_is_told(site: Site) -> None:
    with receiver() as there:
        fields = {
            "strength": "0.6",
            "steps": "5",
            "webhook": there.url,
            "webhook_events_filter": ["output", "completed"],
        }
        answer = site.client.post("/jobs", files={"image": ("a.png", CAT)}, data=fields)
        assert answer.status_code == 202, answer.text
        settled(site, answer.json()["id"], 2)
        one = {"webhook": there.url, "webhook_events_filter": "output"}
        answer = site.client.post("/jobs", json=SPEC | one)
        assert answer.status_code == 202, answer.text
        assert [each["event"] for each in settled(site, answer.json()["id"], 1)] == ["output"]
        assert sorted(there.events()) == ["completed", "output", "output"]


# --- what is refused ---


@pytest.mark.parametrize(
    "query",
    [
        "steps=2&%77ebhook=https://hooks.example/s3cret",
        "web%68ook=https://hooks.example/x?a=b&token=s3cret",
    ],
)
def test_in_the_query_it_is_refused_and_the_log_has_no_more_of_it(
    site: Site, caplog: pytest.LogCaptureFixture, query: str
) -> None:
    with caplog.at_level("DEBUG"):
        answer = site.client.post(f"/jobs?{query}")
    problem(answer, 422, "invalid_field")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("tminus")]
    assert any("webhook=…" in line for line in ours)
    assert not [line for line in ours if "s3cret" in line]


def test_without_a_durable_job_or_a_secret_of_the_server_there_is_none(site: Site, make_site: MakeSite) -> None:
    body = SPEC | {"webhook": "https://hooks.example/x"}
    document = problem(site.post(json=body), 422, "unknown_field")
    assert (document["field"], document["value"]) == ("webhook", "https://hooks.example")
    problem(site.client.get("/sample?steps=2&webhook=https://hooks.example/x"), 422, "invalid_field")
    document = problem(make_site().client.post("/jobs", json=body), 422, "invalid_field")
    assert "--webhook-secret" in document["bound"]


def test_a_receiver_that_takes_nothing_is_named_by_no_more_jobs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliverer, "FIRST_WAIT_S", 3600.0)
    monkeypatch.setattr("tminus.service.jobs.jobs.MOST_OWED", 2)
    with receiver(status(503)) as there, receiver() as other:
        body = SPEC | {"webhook": f"{there.url}/x{TOKEN}", "webhook_events_filter": ["completed"]}
        for _ in range(2):
            wait_for(site, post(site, body).json()["id"])
        refused = site.client.post("/jobs", json=body)
        document = problem(refused, 429, "overloaded")
        assert (document["field"], document["value"]) == ("webhook", there.url)
        assert refused.headers["retry-after"] == "60"
        settled(site, post(site, SPEC | {"webhook": other.url}).json()["id"], 3)


def test_a_key_covers_the_webhook(site: Site) -> None:
    with receiver() as there:
        body = SPEC | {"webhook": there.url}
        first = post(site, body, **{"Idempotency-Key": "k"}).json()["id"]
        again = post(site, body, **{"Idempotency-Key": "k"})
        assert again.json()["id"] == first
        assert again.headers["idempotent-replayed"] == "true"
        for other in (SPEC, body | {"webhook": f"{there.url}/x"}, body | {"webhook_events_filter": ["output"]}):
            answer = site.client.post("/jobs", json=other, headers={"Idempotency-Key": "k"})
            problem(answer, 422, "idempotency_key_reused")
        settled(site, first, 3)
        assert len(there.told) == 3


def test_of_whom_a_job_tells_only_its_owner_and_admins_hear(make_site: MakeSite) -> None:
    lines = [
        key_line("studio", "one-secret"),
        key_line("other", "other-secret"),
        key_line("ops", "admin-secret", "admin"),
    ]
    site = make_telling(make_site, app={"access": access_of(*lines)})
    with receiver() as there:
        answer = site.client.post(
            "/jobs", json=SPEC | {"webhook": f"{there.url}/x{TOKEN}"}, headers=bearer("one-secret")
        )
        job_id = answer.json()["id"]
        there.wait_for(3)
        problem(site.client.get(f"/jobs/{job_id}", headers=bearer("other-secret")), 404, "job_not_found")
        for secret in ("one-secret", "admin-secret"):
            seen = site.client.get(f"/jobs/{job_id}", headers=bearer(secret))
            assert seen.json()["webhook"]["receiver"] == there.url
            assert "s3cret" not in seen.text
