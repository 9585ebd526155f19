from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, Labels, hash_weights
from model.noise import NoiseConfig
from model.unet import UNet2D
from service.executors import Executor
from tests.tiny import TINY, randomize

CONDITIONAL = replace(TINY, num_class_embeds=4)
THREE_CLASSES = Labels(("cat", "dog", "3d-print"), null_class=3)


class Around:
    """An executor around another. Subclasses do their part in `__call__`."""

    def __init__(self, executor: Executor) -> None:
        self.name, self.precision, self.details = executor.name, executor.precision, executor.details
        self.executor = executor

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.executor(x, t, class_labels)

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        return lambda: self(x, t, class_labels)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # For nets this small a second thread costs more than it brings, and the bits do not depend on the machine.
    torch.set_num_threads(1)


MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """Makes a checkpoint in memory: a tiny U-Net of random weights, conditional unless `classes` is False."""

    def make(*, classes: bool = True, noise: NoiseConfig | None = None, seed: int = 0, **fields: object) -> Checkpoint:
        config = replace(CONDITIONAL, **({} if classes else {"num_class_embeds": None}) | fields)  # type: ignore[arg-type]
        net = UNet2D(config)
        randomize(net, seed)
        with torch.no_grad():
            if net.class_embedding is not None:  # classes must matter, or a wrong one would not be seen
                net.class_embedding.weight.mul_(4)
        net.requires_grad_(False).eval()
        assert config.size_px is not None
        return Checkpoint(
            net=net,
            noise=noise or NoiseConfig(num_train_timesteps=50, beta_end=0.1),
            labels=THREE_CLASSES if classes else Labels(),
            weights_hash=hash_weights(net.state_dict()),
            name="tiny",
            size_px=config.size_px,
        )

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """8x8, one channel, three classes and a null class, T = 50."""
    return make_checkpoint()
