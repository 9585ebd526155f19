"""GET / and /docs, the files of both, and the schedule that the page draws."""

import json
import math
import re
from dataclasses import replace

import numpy as np

from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO
from tminus.model.noise import NoiseConfig


def test_the_page_and_its_files_are_served(site: Site) -> None:
    page = site.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"page/{name}" in page.text
        file = site.client.get(f"/page/{name}")
        assert file.status_code == 200
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert site.client.get(f"/page/{name}", headers={"If-None-Match": file.headers["etag"]}).status_code == 304


def test_long_texts_of_the_page_are_compressed_for_those_who_take_it(site: Site) -> None:
    for path in ("/page/page.js", "/model/schedule"):
        plain = site.client.get(path, headers={"Accept-Encoding": "identity"})
        packed = site.client.get(path, headers={"Accept-Encoding": "gzip"})
        assert packed.content == plain.content
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < 0.6 * int(plain.headers["content-length"])
        assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    tag = site.client.get("/page/page.js", headers={"Accept-Encoding": "gzip"}).headers["etag"]
    assert tag.startswith('W/"'), "it stands for both forms"
    for taken in ("identity", "gzip;q=0", "*;q=0, identity"):
        answer = site.client.get("/page/page.js", headers={"Accept-Encoding": taken})
        assert "content-encoding" not in answer.headers
        assert (answer.headers["vary"], answer.headers["etag"]) == ("Accept-Encoding", tag)
    for taken in ("identity", "gzip"):
        known = {"Accept-Encoding": taken, "If-None-Match": f'"other", {tag}'}
        again = site.client.get("/page/page.js", headers=known)
        assert (again.status_code, again.headers["etag"], again.headers["vary"]) == (304, tag, "Accept-Encoding")
    part = site.client.get("/page/page.js", headers={"Accept-Encoding": "gzip", "Range": "bytes=0-999"})
    assert (part.status_code, len(part.content)) == (206, 1000)
    assert "content-encoding" not in part.headers


def test_the_page_names_all_files_that_it_needs_at_first(site: Site) -> None:
    """So that a browser asks for all of them at once."""
    needed: set[str] = set()
    waiting = ["page.js"]
    while waiting:
        script = site.client.get(f"/page/{waiting.pop()}")
        assert script.status_code == 200
        found = set(re.findall(r'^(?:import|export) [^;]*?"\./([^"]+)";', script.text, re.MULTILINE)) - needed
        needed |= found
        waiting += found
    page = site.client.get("/").text
    assert re.findall(r'rel="modulepreload" href="page/([^"]+)"', page) != []
    assert set(re.findall(r'rel="modulepreload" href="page/([^"]+)"', page)) == needed
    later = re.search(r"^const LATER = (\[.*\]);$", site.client.get("/page/page.js").text, re.MULTILINE)
    assert later is not None
    for name in json.loads(later[1]):
        assert site.client.get(f"/page/{name}.js").status_code == 200
        assert f"{name}.js" not in needed


def test_a_link_to_metrics_on_another_port_is_not_shown(make_site: MakeSite) -> None:
    site = make_site(app={"with_metrics": False})
    assert site.client.get("/metrics").status_code == 404
    page = site.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    hidden = {name: f'<a id="{name}" hidden' in page.text for name in ("docs", "metrics")}
    assert hidden == {"docs": False, "metrics": True}


def test_no_other_file_is_served(site: Site) -> None:
    for path in ("/page/nothing.js", "/page/..%2fapp.py", "/docs/..%2fcore.py"):
        problem(site.client.get(path), 404, "not_found")


def test_the_schedule_is_that_of_the_model(make_site: MakeSite) -> None:
    for config in (NoiseConfig(), NoiseConfig(num_train_timesteps=1), NoiseConfig(beta_schedule="squaredcos_cap_v2")):
        schedule = config.schedule()
        site = make_site(info=replace(INFO, num_timesteps=len(schedule.betas), log_sigmas=tuple(schedule.log_sigmas)))
        got = site.client.get("/model/schedule").json()
        np.testing.assert_allclose(got["alpha_bar"], np.cumprod(1 - schedule.betas.numpy()), rtol=1e-9)
        np.testing.assert_allclose(got["beta"], schedule.betas.numpy(), rtol=1e-6)
    site = make_site(info=replace(INFO, num_timesteps=2, log_sigmas=(0.0, math.inf)))
    assert site.client.get("/model/schedule").json() == {"alpha_bar": [0.5, 0.0], "beta": [0.5, 1.0]}


def test_all_that_docs_loads_is_served_from_here(site: Site) -> None:
    page = site.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    directives = dict(each.split(" ", 1) for each in page.headers["content-security-policy"].split("; "))
    assert {directives[kind] for kind in ("script-src", "connect-src")} == {"'self'"}
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "page/docs.js"} <= {*loaded}
    for name in loaded:
        file = site.client.get(f"/{name}")
        assert (file.status_code, len(file.content) > 0) == (200, True), name
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert site.client.get(f"/{name}", headers={"If-None-Match": file.headers["etag"]}).status_code == 304
    assert "openapi.json" in site.client.get("/page/docs.js").text
