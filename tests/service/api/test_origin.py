"""Who may ask: pages of other sites start nothing here, and a name that is not ours reads nothing."""

from typing import Any

import pytest

from tests.service.conftest import INSTANT, Site
from tests.service.fakes import INFO, LIMITS
from tminus.service.api.edge.origin import AllowedSites

SPEC = {"steps": 1, "seed": 1}
CROSS = {"Sec-Fetch-Site": "cross-site"}
FOREIGN = {"Origin": "https://evil.example", **CROSS}


def code(answer: Any) -> str:
    return str(answer.json()["code"])


@pytest.mark.parametrize(
    "headers",
    [FOREIGN, {"Origin": "null"}, {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, CROSS],
    ids=["foreign", "sandboxed", "another port", "image or form of old"],
)
def test_a_page_of_another_site_starts_changes_and_sees_nothing(site: Site, headers: dict[str, str]) -> None:
    job = site.client.post("/jobs", json=SPEC).json()["id"]
    asked = {
        "sample": site.client.post("/sample", json=SPEC, headers=headers),
        "image": site.client.get("/sample?n=4", headers=headers),
        "plain text": site.client.post("/jobs", content="{}", headers=headers | {"Content-Type": "text/plain"}),
        "form": site.client.post("/jobs", data={"n": "4"}, headers=headers),
        "cancel": site.client.post(f"/jobs/{job}/cancel", headers=headers),
        "delete": site.client.delete(f"/jobs/{job}", headers=headers),
        "jobs": site.client.get("/jobs", headers=headers),
        "batch": site.client.get("/batch", headers=headers),
        "noise": site.client.post("/noise?t=5", content=b"x", headers=headers),
        "image of a model": site.client.get("/models/fake/sample?n=4", headers=headers),
        "jobs of a model": site.client.get("/models/fake/jobs", headers=headers),
        "reload": site.client.post("/models/fake/reload", headers=headers),
    }
    assert {name: (answer.status_code, code(answer)) for name, answer in asked.items()} == dict.fromkeys(
        asked, (403, "foreign_origin")
    )
    assert len(site.client.get("/jobs").json()["jobs"]) == 1
    assert site.metrics()['tminus_rejected_total{"reason": "foreign_origin"}'] == len(asked)


def test_programs_pages_of_our_own_links_and_probes_are_answered(site: Site) -> None:
    for headers in (
        {},  # no browser
        {"Origin": "https://localhost"},  # ours behind TLS
        {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "same-origin"},  # an image of ours
    ):
        assert site.client.post("/sample", json=SPEC, headers=headers).status_code == 200
        assert site.client.get("/sample?steps=1", headers=headers).status_code == 200
    for path in ("/", "/model", "/healthz", "/docs"):
        assert site.client.get(path, headers=CROSS | {"Sec-Fetch-Mode": "navigate"}).status_code == 200
    for host in ("LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert site.client.get("/model", headers={"Host": host}).status_code == 200
    for path in ("/healthz", "/readyz", "/health", "/metrics"):
        assert site.client.get(path, headers={"Host": "tminus.monitoring.svc:8000"}).status_code == 200
    assert site.client.get("/jobs/", follow_redirects=False).status_code == 404, "no redirect to a host of the client"


def test_a_name_that_is_listed_is_ours() -> None:
    site = Site(INFO, LIMITS, INSTANT, allowed_sites=AllowedSites(hosts=frozenset({"diffusion.example"})))
    with site.client:
        site.wait_until_ready()
        for host, status in (("Diffusion.Example:8000", 200), ("other.example", 403)):
            assert site.client.get("/model", headers={"Host": host}).status_code == status


def test_pages_of_origins_that_are_allowed_are_answered_and_may_read_the_answer() -> None:
    site = Site(INFO, LIMITS, INSTANT, allowed_sites=AllowedSites(origins=frozenset({"https://studio.example"})))
    with site.client:
        site.wait_until_ready()
        origin = {"Origin": "https://studio.example", **CROSS}
        asked = site.client.options("/jobs", headers=origin | {"Access-Control-Request-Method": "POST"})
        assert asked.headers["access-control-allow-origin"] == "https://studio.example"
        unknown = origin | {"Host": "evil.example"}
        asked = site.client.options("/jobs", headers=unknown | {"Access-Control-Request-Method": "POST"})
        assert (asked.status_code, asked.text) == (200, "OK"), "it asks what is allowed, and reads nothing"
        refused = site.client.post("/jobs", json=SPEC, headers=unknown)
        assert (refused.status_code, code(refused)) == (403, "foreign_host")
        assert refused.headers["access-control-allow-origin"] == "https://studio.example", "it may read why"
        answer = site.client.post("/sample", json=SPEC, headers=origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://studio.example"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"X-Seed", "X-Sampler", "X-Steps", "X-Guidance", "Inference-Header-Content-Length"} <= {*exposed}
        image = CROSS | {"Referer": "https://studio.example/gallery"}
        assert site.client.get("/sample?steps=1", headers=image).status_code == 200
        assert code(site.client.post("/sample", json=SPEC, headers=FOREIGN)) == "foreign_origin"


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "["])
def test_a_name_that_is_not_ours_reads_and_deletes_nothing(site: Site, host: str) -> None:
    """By DNS rebinding such a page is of our own origin, as browsers see it."""
    job = site.client.post("/jobs", json=SPEC).json()["id"]
    rebound = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for method, path in (
        ("GET", "/jobs"),
        ("DELETE", f"/jobs/{job}"),
        ("POST", "/sample"),
        ("GET", "/"),
        ("GET", "/model"),
    ):
        answer = site.client.request(method, path, headers=rebound)
        assert (answer.status_code, code(answer)) == (403, "foreign_host"), (method, path)
        assert answer.json()["field"] == "Host"
    assert len(site.client.get("/jobs").json()["jobs"]) == 1
