import copy

import pytest
import torch

from tests.tiny import randomize
from tminus.model.training.run import Ema


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (90, 0.91), (8_989, 0.999), (10**6, 0.999)])
def test_decay_warms_up_as_one_plus_step_over_ten_plus_step(step: int, decay: float) -> None:
    net = torch.nn.Linear(3, 2)
    ema = Ema(net, 0.999)
    before = copy.deepcopy(ema.shadow)
    randomize(net, seed=1)
    ema.update(net, step)
    for key, value in net.state_dict().items():
        expected = decay * before[key].double() + (1 - decay) * value.double()
        torch.testing.assert_close(ema.shadow[key].double(), expected, rtol=1e-5, atol=1e-7)


def test_average_of_many_updates_is_the_weighted_sum_written_out() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = Ema(net, 0.9)
    expected = 0.0
    for step in range(200):
        value = float((step * 7919) % 13)
        net.weight.data.fill_(value)
        ema.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-5)
