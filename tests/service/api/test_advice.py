from dataclasses import replace

import pytest

from tests.service.api.pictures import CAT, EDIT, b64
from tests.service.conftest import Site
from tests.service.fakes import INFO, make_spec, wait_until
from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.timesteps import SPACINGS
from tminus.service.api.submission import warning_of
from tminus.service.work import timesteps_of


@pytest.mark.parametrize("sampler", INFO.samplers)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_a_client_is_warned_exactly_where_noise_is_taken_for_an_image(sampler: str, spacing: str, steps: int) -> None:
    facts = SAMPLER_FACTS[sampler]
    spec = make_spec(sampler=sampler, timestep_spacing=spacing, steps=min(steps, facts.max_steps(INFO.num_timesteps)))
    expected = steps == 1 and not facts.multistep and spacing in ("leading", "linspace")
    assert (warning_of(spec, INFO) is not None) == expected
    assert expected == (timesteps_of(spec, INFO)[0] == 0)


def test_the_spacing_that_the_warning_names_is_not_warned_of() -> None:
    spec = make_spec(steps=1)
    warning = warning_of(spec, INFO)
    assert warning is not None
    assert "timestep_spacing=trailing" in warning
    assert warning_of(replace(spec, timestep_spacing="trailing"), INFO) is None


def test_an_edit_begins_with_an_image_and_is_not_warned_of() -> None:
    assert warning_of(make_spec(steps=1, strength=1.0, image_sha256="0" * 64), INFO) is None


def test_a_schedule_without_much_noise_is_not_warned_of_at_its_end() -> None:
    model = replace(INFO, num_timesteps=1, log_sigmas=(-4.0,))
    assert warning_of(make_spec(steps=1), model) is None


def test_the_warning_is_in_a_header_of_images_and_of_jobs(site: Site) -> None:
    one, two = {"steps": 1, "seed": 5}, {"steps": 2, "seed": 5}
    for answer in (site.post(json=one), site.client.get("/sample", params=one), site.client.post("/jobs", json=one)):
        assert "timestep 0" in answer.headers["x-warning"]
    same = site.post(json=one, headers={"If-None-Match": site.post(json=one).headers["etag"]})
    assert (same.status_code, "x-warning" in same.headers) == (304, True)
    for answer in (
        site.post(json=two),
        site.client.post("/jobs", json=two),
        site.post(json=one | {"timestep_spacing": "trailing"}),
        site.post(json=EDIT | {"steps": 1, "strength": 1, "image": b64(CAT)}),
    ):
        assert answer.is_success
        assert "x-warning" not in answer.headers


def test_the_images_of_a_durable_job_have_the_warning_too(site: Site) -> None:
    path = site.client.post("/jobs", json={"steps": 1}).headers["location"]
    wait_until(lambda: site.client.get(path).json()["state"] == "done")
    assert "timestep 0" in site.client.get(f"{path}/image").headers["x-warning"]
