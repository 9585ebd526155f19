"""Keys over HTTP and WebSockets: who is let in, sees which jobs, and is refused for its quota."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse

from tests.service.api.test_stream import connect
from tests.service.conftest import MakeSite, Site, problem
from tests.service.durable import wait_for
from tests.service.fakes import wait_until
from tests.service.keys import access_of, bearer, key_line
from tminus.service.access.access import MOST_WRONG_LOGINS, Access
from tminus.service.access.keys import LOOK_S, KeyRing
from tminus.service.api import stream as routes_stream
from tminus.service.api.answers.problems import error_form
from tminus.service.api.edge.authentication import COOKIE, is_open

ANN, BEN, OPS = "tm_ann", "tm_ben", "tm_ops"
LINES = key_line("ann", ANN), key_line("ben", BEN), key_line("ops", OPS, "admin")
SPEC: dict[str, Any] = {"n": 2, "steps": 4, "seed": 5, "class_label": "cat"}
NO_JOB = "0" * 32


@pytest.fixture
def keyed(make_site: MakeSite) -> Site:
    return make_site(app={"access": access_of(*LINES)})


def limited(make_site: MakeSite, **limits: int) -> Site:
    return make_site(app={"access": access_of(key_line("ann", ANN, **limits), *LINES[1:])})


def as_(secret: str) -> dict[str, Any]:
    return {"headers": bearer(secret)}


def submit(site: Site, secret: str, **more: Any) -> str:
    response = site.client.post("/jobs", json=SPEC | more, headers=bearer(secret))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def listed(site: Site, secret: str) -> set[str]:
    return {job["id"] for job in site.client.get("/jobs", headers=bearer(secret)).json()["jobs"]}


# --- who is let in ---


def paths_of(site: Site) -> list[tuple[str, str]]:
    described = site.client.get("/openapi.json", **as_(OPS)).json()["paths"]
    found = [(method.upper(), path) for path, methods in described.items() for method in methods]
    found += [("GET", path) for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json", "/models/fake/sample")]
    return [(method, path.format(job_id=NO_JOB, model="fake", version="0")) for method, path in found]


def test_every_path_asks_for_a_key_but_those_of_probes_and_of_the_page(keyed: Site) -> None:
    before = list(keyed.engine.batches)
    paths = paths_of(keyed)
    assert len(paths) > 25
    asked = {path for method, path in paths if not is_open(path, method)}
    assert {("POST", "/"), ("POST", "/models/fake"), ("POST", "/v2/models/fake/infer"), ("GET", "/v2")} <= {*paths}
    assert {"/sample", "/jobs", "/model", "/noise", "/metrics", "/key", "/docs", "/openapi.json"} <= asked
    assert {"/healthz", "/readyz", "/health"} <= {path for _, path in paths} - asked
    for method, path in paths:
        for sent in ({}, bearer("tm_wrong"), {"Authorization": "Basic YW5uOnRtX2Fubg=="}, {"Cookie": f"{COOKIE}=x"}):
            response = keyed.client.request(method, path, headers=sent)
            if is_open(path, method):
                assert response.status_code != 401 or path == "/login"
            else:
                if error_form(method, path) is not None:
                    document = response.json()
                    code = document["code"] if "code" in document else document["error"]["code"]
                    assert (response.status_code, code) == (401, "unauthorized")
                else:
                    problem(response, 401, "unauthorized")
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert "tm_" not in response.text
    assert keyed.engine.batches == before


@pytest.mark.parametrize("path", ["/page/..%2fsample", "/PAGE/x", "//page/x", "/sample/"])
def test_no_detour_leads_past_the_keys(keyed: Site, path: str) -> None:
    before = list(keyed.engine.batches)
    assert keyed.client.get(path).status_code in (401, 404)
    assert keyed.client.post(path, json=SPEC).status_code in (401, 404, 405)
    assert keyed.engine.batches == before


def test_a_key_lets_its_owner_in_and_nobody_elses_body_is_read(keyed: Site) -> None:
    for secret in (ANN, OPS):
        assert keyed.post(json=SPEC, headers=bearer(secret)).status_code == 200
    assert keyed.post(json=SPEC, headers={"Authorization": f"bearer  {ANN} "}).status_code == 200
    assert keyed.client.get("/metrics", **as_(ANN)).status_code == 200
    problem(keyed.client.post("/sample", content=b"x" * 2**24), 401, "unauthorized")
    path = "/models/fake/reload"
    assert problem(keyed.client.post(path, **as_(ANN)), 403, "forbidden")["detail"].endswith("ann has the role sample")
    assert keyed.client.post(path, **as_(OPS)).status_code not in (401, 403)


def test_an_open_server_takes_keys_too_and_refuses_wrong_ones_and_one_without_keys_looks_at_none(
    make_site: MakeSite,
) -> None:
    site = make_site(app={"access": access_of(*LINES, is_open=True)})
    assert site.post(json=SPEC).status_code == 200
    assert site.client.get("/key", **as_(ANN)).json()["name"] == "ann"
    problem(site.post(json=SPEC, headers=bearer("tm_wrong")), 401, "unauthorized")
    without = make_site()
    assert without.post(json=SPEC, headers=bearer("of-a-proxy")).status_code == 200
    assert without.client.get("/key", headers=bearer("of-a-proxy")).json()["name"] is None


def test_a_refusal_is_counted_and_no_log_shows_a_key(keyed: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "tminus"):
        keyed.post(json=SPEC, headers=bearer("tm_wrong"))
        keyed.post(json=SPEC, headers=bearer(ANN))
        keyed.client.post("/login", json={"key": "tm_wrong"})
        answers = [
            keyed.client.post("/login", json={"kee": ANN}),
            keyed.client.post("/login", json={"kee": "a secret of somebody's own"}),
            keyed.client.post("/login", json={"key": [ANN]}),
            keyed.client.post("/login", content=f'{{"key": "{ANN}", "key": "{ANN}"}}'),
            keyed.client.post(f"/login?key={ANN}", json={"key": ANN}),
            keyed.client.get(f"/sample?key={ANN}", headers=bearer(ANN)),
            keyed.client.get(f"/sample?steps={ANN}", headers=bearer(ANN)),
            keyed.client.post("/sample", json={"key": {"a": [ANN]}}, headers=bearer(ANN)),
            *(
                keyed.client.get(f"/sample?{query}{ANN}", headers=bearer(ANN))
                for query in ("authorization=Bearer%20", "q=%22", "q=key%3D", "q=%0A")
            ),
        ]
        keyed.client.get(f"/jobs/%7B{ANN}", headers=bearer(ANN))
        with connect(keyed, **bearer(ANN)) as client:
            client.run(**SPEC)
        keyed.client.post("/login", json={"key": ANN})
    for answer in answers:
        assert answer.status_code in (400, 422)
        assert "tm_ann" not in answer.text
        assert "of somebody's own" not in answer.text
    assert "tm_" not in caplog.text.replace("tm_…", "").replace("tm_\\u2026", "")
    assert "of testclient (ann): POST /sample 200" in caplog.text
    assert "is of ann" in caplog.text, "over a WebSocket too"
    samples = {
        line.split()[0]: float(line.split()[1])
        for line in keyed.client.get("/metrics", **as_(OPS)).text.splitlines()
        if line.startswith(("tminus_rejected", "tminus_key"))
    }
    assert samples['tminus_rejected_total{reason="unauthorized"}'] == 2
    assert samples['tminus_key_places_total{key="ann"}'] == 16
    assert samples["tminus_keys_up"] == 1


def test_keys_of_a_file_change_while_the_server_runs(make_site: MakeSite, tmp_path: Path) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text(LINES[0])
    site = make_site(app={"access": Access(KeyRing(file=file, clock=lambda: now[0]), is_open=False)})
    assert site.post(json=SPEC, headers=bearer(ANN)).status_code == 200
    with connect(site, **bearer(ANN)) as client:
        client.run(**SPEC, keep_open=True)
        file.write_text(LINES[1])
        now[0] += 2 * LOOK_S
        client.send(**SPEC)
        client.refused("unauthorized", 1008)
    problem(site.post(json=SPEC, headers=bearer(ANN)), 401, "unauthorized")
    assert site.post(json=SPEC, headers=bearer(BEN)).status_code == 200
    file.write_text("a mistake")
    now[0] += 2 * LOOK_S
    assert site.post(json=SPEC, headers=bearer(BEN)).status_code == 200
    assert "tminus_keys_up 0.0" in site.client.get("/metrics", **as_(BEN)).text


# --- the page's cookie ---


def test_a_login_is_kept_in_a_cookie_until_the_logout(keyed: Site) -> None:
    client = keyed.client
    response = client.post("/login", json={"key": ANN})
    assert response.json() == client.get("/key").json() | {"name": "ann"}
    cookie = response.headers["set-cookie"]
    assert all(each in cookie.lower() for each in ("httponly", "samesite=strict", "path=/", "max-age="))
    assert "secure" not in cookie.lower(), "over http a browser would not send it back"
    assert response.headers["cache-control"] == "no-store"
    job_id = submit(keyed, ANN)
    wait_for(keyed, job_id)
    assert client.get(f"/jobs/{job_id}/image").status_code == 200
    assert client.get("/key", **as_(BEN)).json()["name"] == "ben", "a header comes before a cookie"
    with connect(keyed, Cookie=f"a=b; {COOKIE}={ANN}") as ws:
        ws.run(**SPEC)
    assert client.post("/logout").status_code == 204
    problem(client.get("/key"), 401, "unauthorized")


def test_a_bad_login_is_refused_and_the_cookie_of_https_never_goes_over_http(keyed: Site) -> None:
    for body, status, code in (
        ({"key": "tm_wrong"}, 401, "unauthorized"),
        ({"key": "\ud800"}, 422, "invalid_field"),
        ({"key": 5}, 422, "invalid_field"),
        ({"key": ANN, "name": "ann"}, 422, "unknown_field"),
        ([ANN], 400, "malformed_body"),
    ):
        response = keyed.client.post("/login", content=json.dumps(body))
        problem(response, status, code)
        assert "set-cookie" not in response.headers
        assert "tm_" not in response.json()["detail"]
    response = keyed.client.post("https://localhost/login", json={"key": ANN})
    assert "secure" in response.headers["set-cookie"].lower()


def test_wrong_keys_at_the_login_of_one_address_lock_no_other_out(keyed: Site) -> None:
    answers = [keyed.client.post("/login", json={"key": "tm_wrong"}) for _ in range(MOST_WRONG_LOGINS + 1)]
    assert [answer.status_code for answer in answers] == [401] * MOST_WRONG_LOGINS + [429]
    elsewhere = TestClient(keyed.app, base_url="http://localhost", client=("2001:db8::1", 1))
    assert elsewhere.post("/login", json={"key": ANN}).status_code == 200


# --- streams ---


def test_a_stream_takes_the_key_in_its_head_or_in_its_first_message_as_pages_have_to_send_it(keyed: Site) -> None:
    with connect(keyed, **bearer(ANN)) as client:
        client.run(**SPEC)
    with pytest.raises(WebSocketDenialResponse) as caught, connect(keyed, **bearer("tm_wrong")):
        pass
    assert (caught.value.status_code, caught.value.json()["code"]) == (401, "unauthorized")
    with connect(keyed) as client:
        client.send(type="key", key=ANN)
        client.run(**SPEC, keep_open=True)
        client.run(**SPEC)
    assert listed(keyed, ANN) == set()


def test_without_a_good_key_a_stream_is_closed(keyed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(keyed.engine.batches)
    firsts: tuple[tuple[dict[str, Any], str], ...] = (
        ({"type": "key", "key": "tm_wrong"}, "unauthorized"),
        ({"type": "key", "key": 5}, "malformed_message"),
        ({"type": "key", "key": ANN, "n": 1}, "malformed_message"),
        ({"type": "key", "key": ANN + 1024 * "x"}, "unauthorized"),
        (SPEC, "unauthorized"),
    )
    for first, code in firsts:
        with connect(keyed) as client:
            client.send(**first)
            client.refused(code, 1008)
    monkeypatch.setattr(routes_stream, "FIRST_MESSAGE_S", 0.05)
    with connect(keyed) as client:
        assert client.get("error")["code"] == "silence"
    assert keyed.engine.batches == before


def test_who_has_not_said_who_it_is_learns_of_no_model(keyed: Site) -> None:
    path = "/models/nope/sample/stream"
    with connect(keyed, path) as client:
        client.send(type="key", key="tm_wrong")
        client.refused("unauthorized", 1008)
    with connect(keyed, path) as client:
        client.send(type="key", key=ANN)
        client.send(**SPEC)
        assert client.get("error")["code"] == "model_not_found"
    with pytest.raises(WebSocketDenialResponse) as caught, connect(keyed, path, **bearer(ANN)):
        pass
    assert caught.value.json()["code"] == "model_not_found"


# --- whose jobs ---


def test_each_sees_its_own_jobs_and_an_admin_all(keyed: Site) -> None:
    of_ann, of_ben = submit(keyed, ANN), submit(keyed, BEN)
    for job_id, secret in ((of_ann, ANN), (of_ben, BEN)):
        wait_until(lambda j=job_id, s=secret: keyed.client.get(f"/jobs/{j}", **as_(s)).json()["state"] == "done")
    assert (listed(keyed, ANN), listed(keyed, BEN), listed(keyed, OPS)) == ({of_ann}, {of_ben}, {of_ann, of_ben})
    for method, path in (
        ("GET", f"/jobs/{of_ann}"),
        ("GET", f"/jobs/{of_ann}/image"),
        ("GET", f"/jobs/{of_ann}/events"),
        ("POST", f"/jobs/{of_ann}/cancel"),
        ("DELETE", f"/jobs/{of_ann}"),
    ):
        theirs = keyed.client.request(method, path, **as_(BEN))
        nobodys = keyed.client.request(method, path.replace(of_ann, NO_JOB), **as_(BEN))
        problem(theirs, 404, "job_not_found")
        assert theirs.text.replace(of_ann, NO_JOB) == nobodys.text, "as if there were none"
    assert keyed.client.get(f"/jobs/{of_ann}/image", **as_(OPS)).status_code == 200
    assert keyed.client.delete(f"/jobs/{of_ann}", **as_(OPS)).status_code == 204
    assert listed(keyed, ANN) == set()


def test_so_it_is_while_they_run(keyed: Site) -> None:
    site = keyed
    site.engine.gate.shut()
    of_ann = submit(site, ANN)
    site.engine.next_begun()
    with connect(site, **bearer(BEN)) as client:
        client.send(**SPEC)
        passing = client.get("accepted")["id"]
        assert (listed(site, ANN), listed(site, BEN), listed(site, OPS)) == ({of_ann}, {passing}, {of_ann, passing})
        for path in (f"/jobs/{of_ann}", f"/jobs/{passing}"):
            theirs = ANN if passing in path else BEN
            problem(site.client.get(path, **as_(theirs)), 404, "job_not_found")
            problem(site.client.delete(path, **as_(theirs)), 404, "job_not_found")
        assert site.client.get(f"/jobs/{passing}", **as_(BEN)).json()["state"] in ("waiting", "running")
        assert site.client.delete(f"/jobs/{passing}", **as_(BEN)).status_code == 204
        site.engine.gate.open()
        client.get("cancelled")
    wait_until(lambda: site.client.get(f"/jobs/{of_ann}", **as_(ANN)).json()["state"] == "done")


def test_jobs_that_wait_since_an_earlier_start_have_their_owner_and_count(make_site: MakeSite, tmp_path: Path) -> None:
    access = {"access": access_of(key_line("ann", ANN, jobs=2), *LINES[1:])}
    site = make_site(state_file=tmp_path / "jobs.sqlite", app=access)
    site.engine.gate.shut()
    large, small = submit(site, ANN, n=4), submit(site, ANN, n=1)
    site.engine.next_begun()
    site.worker.drain()
    site.engine.gate.open()
    site.worker.join()
    site.client.__exit__(None, None, None)
    again = make_site(state_file=tmp_path / "jobs.sqlite", app=access, max_rows=2, gate_shut=True)
    site.client.__enter__ = again.client.__enter__  # type: ignore[method-assign]
    again.engine.gate.let()  # the warm-up
    again.wait_until_ready()
    # The small one goes on; the large one waits for a start with more room.
    wait_until(lambda: again.worker.jobs.number_of("ann") == 1)
    assert listed(again, ANN) == {large, small}
    assert listed(again, BEN) == set()
    refused = again.client.post("/jobs", json=SPEC | {"n": 1}, **as_(ANN))
    assert problem(refused, 429, "quota_exceeded")["field"] == "jobs"
    problem(again.client.get(f"/jobs/{small}", **as_(BEN)), 404, "job_not_found")
    again.engine.gate.open()
    wait_until(lambda: again.client.get(f"/jobs/{small}", **as_(ANN)).json()["state"] == "done")


def test_an_idempotency_key_is_its_owners(keyed: Site) -> None:
    def post(secret: str, **more: Any) -> Any:
        headers = bearer(secret) | {"Idempotency-Key": "k"}
        return keyed.client.post("/jobs", json=SPEC | more, headers=headers)

    of_ann, of_ben = post(ANN).json()["id"], post(BEN, seed=6).json()["id"]
    assert of_ann != of_ben
    again = post(ANN)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (of_ann, "true")
    conflict = problem(post(BEN), 422, "idempotency_key_reused")
    assert conflict["value"] == "k"


# --- quotas ---


def test_row_steps_of_a_minute_are_limited_and_what_is_left_is_told(make_site: MakeSite) -> None:
    site = limited(make_site, row_steps_per_minute=20)
    first = site.post(json=SPEC, headers=bearer(ANN))
    assert first.headers["ratelimit-policy"] == '"row-steps";q=20;w=60'
    assert first.headers["ratelimit"].startswith('"row-steps";r=12;t=')
    assert site.post(json=SPEC, headers=bearer(ANN)).status_code == 200
    refused = site.post(json=SPEC, headers=bearer(ANN))
    document = problem(refused, 429, "quota_exceeded")
    assert (document["field"], document["value"]) == ("row_steps", 8)
    assert 10 <= int(refused.headers["retry-after"]) <= 12, "4 of 8 are missing, one comes every 3 s"
    assert refused.headers["ratelimit"].startswith('"row-steps";r=4;t=')
    assert "ratelimit" not in site.post(json=SPEC, headers=bearer(BEN)).headers
    who = site.client.get("/key", **as_(ANN)).json()
    assert who == {
        "name": "ann",
        "role": "sample",
        "row_steps_per_minute": 20,
        "row_steps_left": 4,
        "jobs": None,
        "connections": None,
    }


def test_a_guided_step_counts_twice_and_a_known_answer_or_a_refusal_nothing(make_site: MakeSite) -> None:
    access = access_of(key_line("ann", ANN, row_steps_per_minute=100))
    site = make_site(app={"access": access}, result_cache_bytes=2**20, max_jobs=1)
    left = []

    def look() -> None:
        left.append(site.client.get("/key", **as_(ANN)).json()["row_steps_left"])

    for more in ({}, {"guidance": 2}, {"guidance": 2}, {"n": 1, "seed": 6}):
        assert site.post(json=SPEC | more, headers=bearer(ANN)).status_code == 200
        wait_until(lambda: listed(site, ANN) == set())  # a job has its place until the worker drops it
        look()
    site.engine.gate.shut()
    submit(site, ANN, seed=7)
    site.engine.next_begun()
    for _ in range(3):
        problem(site.post(json=SPEC | {"seed": 8}, headers=bearer(ANN)), 429, "overloaded")
        problem(site.client.post("/jobs", json=SPEC, **as_(ANN)), 429, "overloaded")
    look()
    assert left == [92, 76, 76, 72, 64]
    site.engine.gate.open()


def test_jobs_that_have_not_ended_are_limited_and_a_repeat_is_none(make_site: MakeSite) -> None:
    site = limited(make_site, jobs=1)
    site.engine.gate.shut()
    headers = bearer(ANN) | {"Idempotency-Key": "k"}
    first = site.client.post("/jobs", json=SPEC, headers=headers)
    site.engine.next_begun()
    document = problem(site.client.post("/jobs", json=SPEC, **as_(ANN)), 429, "quota_exceeded")
    assert document["field"] == "jobs"
    assert site.client.post("/jobs", json=SPEC, headers=headers).json()["id"] == first.json()["id"]
    with connect(site, **bearer(ANN)) as client:
        client.send(**SPEC)
        client.refused("quota_exceeded", 1013)
    other = submit(site, BEN)
    site.engine.gate.open()
    for job_id, secret in ((first.json()["id"], ANN), (other, BEN)):
        wait_until(lambda j=job_id, s=secret: site.client.get(f"/jobs/{j}", **as_(s)).json()["state"] == "done")
    assert site.client.post("/jobs", json=SPEC, **as_(ANN)).status_code == 202


def test_connections_are_limited(make_site: MakeSite) -> None:
    site = limited(make_site, connections=1, row_steps_per_minute=1000)
    site.engine.gate.shut()
    with connect(site, **bearer(ANN)) as client:
        client.send(**SPEC)
        client.get("accepted")
        response = site.client.get("/model", **as_(ANN))
        assert problem(response, 429, "quota_exceeded")["field"] == "connections"
        assert response.headers["ratelimit-policy"] == '"row-steps";q=1000;w=60'
        assert site.client.get("/model", **as_(BEN)).status_code == 200
        assert site.client.get("/healthz").status_code == 200
        site.engine.gate.open()
    wait_until(lambda: site.client.get("/model", **as_(ANN)).status_code == 200)


def test_a_secret_that_an_operator_chose_is_kept_in_the_cookie_as_it_is(make_site: MakeSite) -> None:
    secret = 'a;b,"c" \\d ä'
    site = make_site(app={"access": access_of(key_line("ann", secret))})
    assert site.client.post("/login", json={"key": secret}).status_code == 200
    assert site.client.get("/key").json()["name"] == "ann"
