import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tminus.model.pixels import BLACK, Colour, fit_picture, to_model_range, to_uint8

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
