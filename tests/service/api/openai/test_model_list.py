"""GET /v1/models."""

import time

import pytest

from tests.service.api.openai.asking import error_of
from tests.service.conftest import MakeSite
from tests.service.several import make_several


def test_the_models_that_are_served_are_listed_the_default_one_first(make_site: MakeSite) -> None:
    before_s = int(time.time())
    several = make_several(make_site)
    document = several.get("/v1/models").json()
    assert document["object"] == "list"
    assert [entry["id"] for entry in document["data"]] == ["fake", "colour"]
    for entry in document["data"]:
        assert before_s <= entry["created"] <= time.time()
        assert entry | {"created": 0, "id": ""} == {"id": "", "object": "model", "created": 0, "owned_by": "tminus"}
        assert several.get(f"/v1/models/{entry['id']}").json() == entry


@pytest.mark.parametrize("name", ["nobody", "x" * 5000, "%2e%2e"])
def test_another_model_is_404(make_site: MakeSite, name: str) -> None:
    answer = make_several(make_site).get(f"/v1/models/{name}")
    error = error_of(answer, 404, answer.json()["error"]["code"])
    assert error["code"] in ("model_not_found", "not_found")
    assert len(error["message"]) < 400
