"""A picture in JSON or the query, through the app."""

import base64

import pytest

from tests.service.api.pictures import CAT, EDIT, MASK, b64
from tests.service.conftest import Site, problem


def test_what_is_given_in_the_query_alone_may_not_be_an_image(site: Site) -> None:
    for ask in (site.client.get, site.client.post):
        for name in ("image", "mask"):
            document = problem(ask("/sample", params=EDIT | {name: b64(CAT)}), 422, "invalid_field")
            assert document["field"] == name
            assert f"-F {name}=@file" in document["detail"]


def test_an_image_may_be_wrapped_in_lines(site: Site) -> None:
    wrapped = base64.encodebytes(CAT).decode()
    assert "\n" in wrapped
    assert site.post(json=EDIT | {"strength": 0.5, "image": wrapped}).status_code == 200


@pytest.mark.parametrize(
    "text", ["", "%%%", "cat.png", "é", b64(CAT)[:-3], b64(CAT, "image/png").replace(";base64", ""), b64(b"<svg/>")]
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_what_is_no_image_is_refused_by_name(one_site: Site, name: str, text: str) -> None:
    fields = {"image": b64(CAT), "mask": b64(MASK)} | {name: text}
    document = problem(one_site.post(json=EDIT | fields), 422, "invalid_image")
    assert document["field"] == name
    assert len(document["detail"]) < 500
