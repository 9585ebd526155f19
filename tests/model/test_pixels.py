import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tminus.model.pixels import (
    BLACK,
    Colour,
    as_uint8,
    fit_picture,
    shown_channels,
    to_model_range,
    to_uint8,
    to_uint16,
)

WHITE: Colour = (255, 255, 255)


def test_every_pixel_value_survives_the_model_range_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), pixels)


def test_values_beyond_the_range_are_clipped_and_others_rounded() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0, 0.003, -0.003])).tolist() == [0, 255, 128, 128, 127]


def saved(image: Image.Image, **options: Any) -> Image.Image:
    """The picture as it is read from a PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return Image.open(io.BytesIO(out.getvalue()))


def pictures(hidden: int, shown: int) -> list[Image.Image]:
    """Two pixels in each way that a PNG can be transparent: one that is, over a hidden colour, and one that is not."""
    alpha = np.array([[0, 255]], np.uint8)
    grey = np.array([[hidden, shown]], np.uint8)
    return [
        Image.fromarray(np.dstack([grey, grey, grey, alpha])),
        Image.fromarray(np.dstack([grey, alpha])),
        saved(Image.fromarray(grey), transparency=hidden),
        saved(Image.fromarray(np.dstack([grey] * 3)), transparency=(hidden,) * 3),
        saved(Image.fromarray(grey).convert("P"), transparency=hidden),
        saved(Image.fromarray(grey.astype(np.uint16) * 257), transparency=hidden * 257),
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", [BLACK, WHITE, (90, 90, 90)])
def test_the_hidden_colour_of_a_transparent_pixel_never_appears(channels: int, background: Colour) -> None:
    for picture in pictures(hidden=200, shown=40):
        found = fit_picture(picture, (2, 1), channels, background)
        assert found[0, 0].tolist() == [background[0]] * channels, picture.mode
        assert found[0, 1].tolist() == [40] * channels, picture.mode


def test_a_picture_is_cropped_to_the_shape_and_not_squeezed() -> None:
    picture = Image.new("L", (32, 16), 0)
    picture.paste(200, (8, 0, 24, 16))
    assert np.unique(fit_picture(picture, (16, 16), 1)).tolist() == [200]
    assert fit_picture(picture, (8, 4), 3).shape == (4, 8, 3)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1))
def test_an_array_is_rounded_as_a_tensor_is_and_sixteen_bits_by_the_formula(values: list[float]) -> None:
    x = np.array(values, np.float32)
    np.testing.assert_array_equal(as_uint8(x), to_uint8(torch.from_numpy(x)).numpy())
    for value, found in zip(x, to_uint16(x), strict=True):
        exact = (Fraction(min(1.0, max(-1.0, float(value)))) + 1) / 2 * 65535
        assert abs(int(found) - exact) <= 0.5 + 1e-9


def test_a_picture_shows_the_first_channels_that_it_can() -> None:
    assert [shown_channels(channels, alpha=False) for channels in (1, 2, 3, 4, 5, 64)] == [1, 1, 3, 3, 3, 3]
    assert shown_channels(4, alpha=True) == 4


def test_a_model_of_rgba_gets_the_alpha_of_a_picture_and_an_opaque_one_where_there_is_none() -> None:
    for picture in pictures(hidden=200, shown=40)[:5]:
        found = fit_picture(picture, (2, 1), 4)
        assert found[0, :, 3].tolist() == [0, 255], picture.mode
        assert found[0, 1].tolist() == [40, 40, 40, 255], picture.mode
    straight = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    np.testing.assert_array_equal(fit_picture(Image.fromarray(straight), (5, 3), 4), straight)
    for mode in ("1", "L", "RGB", "CMYK", "I;16"):
        assert (fit_picture(Image.new(mode, (5, 3)), (5, 3), 4)[..., 3] == 255).all(), mode


def test_what_is_transparent_lends_no_colour_to_its_neighbours() -> None:
    picture = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (4, 0, 8, 4))
    found = fit_picture(picture, (6, 3), 4)
    assert found[found[..., 3] > 0][:, 0].max() == 0, "no red"


def test_a_picture_has_no_other_number_of_channels() -> None:
    with pytest.raises(ValueError, match="channels of a picture must be 1, 3 or 4"):
        fit_picture(Image.new("RGB", (2, 2)), (2, 2), 5)
