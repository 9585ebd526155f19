"""Images of three classes that a classifier learns at once, and checkpoints of random weights that make such images."""

import torch

from tminus.model.checkpoint import Checkpoint, Labels
from tminus.model.evaluation.classifier import ClassifierTraining
from tminus.model.evaluation.samples import EvaluateOptions
from tminus.model.noise import NoiseConfig
from tminus.model.training.data import ImageSet
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig
from tminus.model.weights import hash_weights

CPU = torch.device("cpu")
NAMES = ("bright", "dark", "striped")
TRAINING = ClassifierTraining(epochs=6, batch_size=16)
OPTIONS = EvaluateOptions(
    num_samples=10, steps=3, guidance=2.0, batch_size=4, seed=2**64 - 1, bound_images=4, bound_timesteps=2
)


def toy_images(num_images: int, seed: int, channels: int = 1, labelled: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 3
    images = torch.randint(0, 60, (num_images, channels, 8, 8), generator=generator)
    images[labels == 0] += 150
    images[labels == 2, :, ::2] += 180
    name = f"toy {seed}"
    if not labelled:
        return ImageSet(images.to(torch.uint8), None, (), name)
    return ImageSet(images.to(torch.uint8), labels, NAMES, name)


def toy_checkpoint(
    class_names: tuple[str, ...] = NAMES, null_class: int | None = 3, learned: bool = False
) -> Checkpoint:
    unet = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=2 if learned else 1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=(len(class_names) + (null_class is not None)) or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2D(unet).requires_grad_(False).eval()
    labels = Labels(class_names, null_class)
    noise = NoiseConfig(num_train_timesteps=20, variance_type="learned_range" if learned else "fixed_small")
    return Checkpoint(net, noise, labels, hash_weights(net.state_dict()), "toy", (8, 8))
