"""Forms with the pictures of an edit, through the app. test_noise.py has the broken ones."""

import pytest

from tests.service.api.pictures import CAT, EDIT, INPUTS, MASK, MASK_PIXELS, PICTURE, b64, got, same, spec_in
from tests.service.conftest import MakeSite, Site, problem


def test_json_and_a_form_are_the_same_edit(site: Site) -> None:
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    answers = [site.post(json=body), site.post(json=body | {"image": b64(CAT, "image/png")})]
    files = {"image": ("cat.png", CAT), "mask": ("mask.png", MASK)}
    answers.append(site.post(files=files, data={k: str(v) for k, v in (EDIT | {"strength": 0.6}).items()}))
    answers.append(site.post(files=files, params=EDIT, data={"strength": "0.6"}))
    answers.append(site.post(json={"image": b64(CAT), "mask": b64(MASK)}, params=EDIT | {"strength": 0.6}))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.content == answers[0].content
        assert answer.headers["etag"] == answers[0].headers["etag"]
        assert same(got(site), PICTURE, MASK_PIXELS)
    fields = spec_in(answers[0].content)
    assert (fields["strength"], fields["image_sha256"]) == (0.6, INPUTS.image_sha256)
    assert fields["mask_sha256"] == INPUTS.mask_sha256


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_broken_or_large_file_of_a_form_is_refused_by_name(make_site: MakeSite, name: str) -> None:
    site = make_site(max_image_bytes=20_000)
    files = {"image": ("a", CAT), "mask": ("b", MASK)}
    broken = site.post(files=files | {name: ("c", CAT[:40])}, params=EDIT)
    assert problem(broken, 422, "invalid_image")["field"] == name
    text = site.post(
        files={other: each for other, each in files.items() if other != name} | {"x": ("x", b"")}, params=EDIT
    )
    assert problem(text, 422, "unknown_field")["bound"] == "image, mask"
    large = CAT.ljust(20_001, b"\0")
    for answer in (
        site.post(files=files | {name: ("c", large)}, params=EDIT),
        site.post(json=EDIT | {"image": b64(CAT), "mask": b64(MASK), name: b64(large)}),
    ):
        document = problem(answer, 413, "body_too_large")
        assert (document["field"], document["bound"]) == (name, "at most 20000 bytes")


def test_the_name_of_a_file_is_no_file(site: Site) -> None:
    answer = site.post(data={"image": "cat.png", "strength": "0.5"}, files={"mask": ("m", MASK)})
    assert "curl -F image=@file" in problem(answer, 422, "invalid_image")["detail"]


def test_one_file_twice_is_a_conflict(site: Site) -> None:
    answer = site.post(files=[("image", ("a", CAT)), ("image", ("b", CAT))], data={"strength": "0.5"})
    assert problem(answer, 422, "conflicting_field")["field"] == "image"


def test_a_field_in_form_and_query_must_be_the_same(site: Site) -> None:
    form = {"files": {"image": ("a", CAT)}, "data": {"strength": "0.5"}}
    assert site.post(**form, params={"strength": "0.50"}).status_code == 200
    assert problem(site.post(**form, params={"strength": "0.6"}), 422, "conflicting_field")["field"] == "strength"
