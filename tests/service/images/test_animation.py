"""What an animation shows and for how long, through the app. tests/service/api/test_sample.py has the rest."""

import numpy as np
import pytest

from tests.service.conftest import Site, frames_of
from tests.service.fakes import fake_pixels, make_spec
from tminus.service.images.encoder import FRAME_MS, LAST_MS, contact_sheet

SPEC = {"n": 2, "steps": 10, "seed": 4, "class_label": "cat"}
WEBP = {"Accept": "image/webp"}


def expected(show: str, steps: list[int]) -> list[np.ndarray]:
    pixels = [fake_pixels(make_spec(n=2, seed=4), step) for step in steps]
    shown = [each if show == "x_t" or step == 10 else 255 - each for each, step in zip(pixels, steps, strict=True)]
    return [contact_sheet(each)[:, :, 0] for each in shown]


@pytest.mark.parametrize("show", ["x_t", "x_0"])
def test_an_animation_shows_every_so_many_steps_and_the_result(site: Site, show: str) -> None:
    response = site.post(json=SPEC | {"every": 3, "show": show}, headers=WEBP)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/webp"
    frames, durations = frames_of(response.content)
    assert durations == [FRAME_MS] * 3 + [LAST_MS]
    for frame, wanted in zip(frames, expected(show, [3, 6, 9, 10]), strict=True):
        np.testing.assert_array_equal(frame, wanted)
