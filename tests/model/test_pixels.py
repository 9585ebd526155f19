import torch

from model.pixels import to_model_range, to_uint8


def test_every_pixel_value_survives_the_model_range_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), pixels)


def test_values_beyond_the_range_are_clipped_and_others_rounded() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0, 0.003, -0.003])).tolist() == [0, 255, 128, 128, 127]
