"""GET /models, and who may load and unload. startup/test_models.py tests what becomes of a change."""

from itertools import product

import pytest

from tests.service.conftest import MakeSite, Site, problem
from tests.service.several import ADMIN, KEY, Several, make_several

CHANGES = [f"/models/{name}/{what}" for name in ("fake", "nobody") for what in ("load", "reload", "unload")]


@pytest.fixture
def several(make_site: MakeSite) -> Several:
    return make_several(make_site)


def test_all_models_are_listed_with_what_they_are(several: Several) -> None:
    fake, colour, third = several.get("/models").json()["models"]
    assert (fake["name"], fake["default"], fake["state"], fake["url"]) == ("fake", True, "loaded", "/models/fake/")
    assert (colour["name"], colour["default"], colour["url"]) == ("colour", False, "/models/colour/")
    assert third == {"name": "third", "default": False, "state": "unloaded", "url": None, "model": None}
    assert fake["model"] == several.get("/model").json() == several.get("/models/fake").json()
    assert colour["model"] == several.get("/models/colour").json() == several.get("/models/colour/model").json()
    assert several.get(colour["url"]).status_code == 200


def test_without_an_admin_key_nobody_may_change_anything(one_site: Site) -> None:
    for path, headers in product(CHANGES, ({}, ADMIN, {"Authorization": "Bearer "})):
        problem(one_site.client.post(path, headers=headers), 403, "admin_off")


def test_with_one_it_has_to_be_sent(several: Several) -> None:
    for path, sent in product(CHANGES, (b"", f"Bearer {KEY[:-1]}".encode(), f"Basic {KEY}".encode(), b"Bearer \xff")):
        response = several.post(path, headers={"Authorization": sent} if sent else {})
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert KEY not in response.text
    assert several.shelf.engines == []


def test_a_query_is_refused(several: Several) -> None:
    assert problem(several.get("/models?x=1"), 422, "unknown_field")["field"] == "x"
    response = several.post("/models/third/load?checkpoint=/etc", headers=ADMIN)
    assert problem(response, 422, "unknown_field")["field"] == "checkpoint", "no request names a path"
