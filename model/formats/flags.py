"""Flags of `tminus convert` for facts that a file may lack. Must not import torch, to keep --help fast."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """A flag with its help text and the values that it accepts."""

    text: str
    choices: tuple[str, ...] = ()
    largest: float | None = None  # upper limit of a number; the lower limit is 1, or 0 for a float
    whole: bool = True

    @property
    def type(self) -> type:
        if self.choices:
            return str
        return int if self.whole else float


OF_SIGMA = ("edm", "consistency")  # predictions of networks that have sigmas instead of betas
FACTS: Mapping[str, Fact] = {
    "image_size": Fact("Side of the images in pixels", largest=4096),
    "timesteps": Fact("Number T of timesteps in training", largest=100_000),
    "beta_schedule": Fact(
        "Schedule of beta: linear, scaled_linear, squaredcos_cap_v2 (OpenAI's cosine) or sigmoid",
        ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    ),
    "beta_start": Fact("First beta; 0.0001 is usual for linear", largest=1, whole=False),
    "beta_end": Fact("Last beta; 0.02 is usual for linear", largest=1, whole=False),
    "variance": Fact("Variance of ancestral sampling: fixed_small or fixed_large", ("fixed_small", "fixed_large")),
    "prediction": Fact(
        "Output of the network: epsilon, sample (x_0) or v_prediction; edm or consistency for OpenAI's "
        "consistency_models",
        ("epsilon", "sample", "v_prediction", *OF_SIGMA),
    ),
    "heads": Fact("Attention heads of each layer; give this or --head-width", largest=1024),
    "head_width": Fact("Channels of each attention head; give this or --heads", largest=4096),
    "attention_order": Fact(
        "Order of the attention's channels: legacy (heads before q, k, v) or new", ("legacy", "new")
    ),
    "rescale_timesteps": Fact("Whether the network was trained on t * 1000 / T: yes or no", ("yes", "no")),
}


def flag(name: str) -> str:
    """Return the name of the flag for a fact."""
    return f"--{name.replace('_', '-')}"
