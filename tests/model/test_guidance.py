from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TINY, randomize
from tminus.model.guidance import guide, guided, rescale
from tminus.model.unet import UNet2D


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 5, 7)])
def test_rescaled_guidance_is_that_of_its_paper(shape: tuple[int, ...], share: float) -> None:
    out_u, out_c = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = guide(out_u, out_c, 7.5)
    positive, cfg = out_c.double().numpy(), out.double().numpy()
    for k in range(len(cfg)):  # Lin et al. 2024, eq. 15 and 16
        rescaled = cfg[k] * positive[k].std() / cfg[k].std()
        final = share * rescaled + (1 - share) * cfg[k]
        np.testing.assert_allclose(rescale(out, out_c, share)[k].numpy(), final, rtol=1e-5, atol=1e-5)


def test_rescaling_leaves_the_learned_variance_alone_and_does_not_look_at_it() -> None:
    out_u, out_c = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = guide(out_u, out_c, 5.0, 2)
    rescaled = rescale(out, out_c, 0.7, 2)
    assert torch.equal(rescaled[:, 2:], out_c[:, 2:])
    assert torch.equal(rescaled[:, :2], rescale(out[:, :2], out_c[:, :2], 0.7))


@given(rows=st.integers(1, 9), size=st.sampled_from([4, 8, 33, 128]), seed=st.integers(0, 99))
def test_a_rescaled_row_has_the_same_bits_alone_and_among_others(rows: int, size: int, seed: int) -> None:
    out, out_c = torch.randn(2, rows, 1, size, size, generator=torch.Generator().manual_seed(seed)).unbind(0)
    share = torch.linspace(0, 1, rows).reshape(-1, 1, 1, 1)
    together = rescale(out, out_c, share)
    for k in range(rows):
        assert torch.equal(rescale(out[k : k + 1], out_c[k : k + 1], share[k : k + 1]), together[k : k + 1])


def test_output_without_any_spread_stays_finite() -> None:
    flat = torch.zeros(1, 1, 4, 4)
    assert torch.isfinite(rescale(flat, torch.randn(1, 1, 4, 4), 1.0)).all()


@torch.no_grad()
def test_rows_are_rescaled_only_where_they_are_guided() -> None:
    net = UNet2D(replace(TINY, num_class_embeds=3))
    randomize(net)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 9.0]), torch.tensor([0, 1])
    out_c, out_u = net(x, t, labels), net(x, t, torch.tensor([2, 2]))
    expected = rescale(guide(out_u, out_c, 4.0), out_c, 0.5)
    torch.testing.assert_close(guided(net, x, t, labels, 2, 4.0, 0.5), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided(net, x, t, labels, 2, 1.0, 0.5), out_c, rtol=1e-4, atol=1e-4)
