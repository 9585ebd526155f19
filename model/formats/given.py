"""What a file does not say and a person has to: the facts that `tminus convert` takes as flags."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from tminus.model.files import CheckpointError
from tminus.model.noise import MAX_TIMESTEPS

FLAGS = {
    "image_size": "the side of the images in pixels",
    "timesteps": "T of the training",
    "beta_schedule": "linear, scaled_linear, squaredcos_cap_v2 (OpenAI's cosine) or sigmoid",
    "variance": "fixed_small or fixed_large",
    "prediction": "epsilon, sample (x_0), v_prediction, or consistency for OpenAI's consistency_models",
    "heads": "attention heads of each layer; or --head-width",
    "head_width": "channels of an attention head; or --heads",
    "attention_order": "legacy (heads before q, k, v) or new",
    "rescale_timesteps": "yes or no: whether the network was given t * 1000 / T",
}
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "variance": ("fixed_small", "fixed_large"),
    "prediction": ("epsilon", "sample", "v_prediction", "consistency"),
    "attention_order": ("legacy", "new"),
    "rescale_timesteps": ("yes", "no"),
}
LARGEST = {"image_size": 4096, "timesteps": MAX_TIMESTEPS, "heads": 1024, "head_width": 4096}


def flag(name: str) -> str:
    """The flag of a fact."""
    return f"--{name.replace('_', '-')}"


class MissingFacts(CheckpointError):
    """A file is recognised, but does not say all that is needed. `names`: of the facts to be given."""

    def __init__(self, what: str, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(f"{what} does not say all that is needed; give {'; '.join(self.asked)}")

    @property
    def asked(self) -> tuple[str, ...]:
        """The flags, each with what it says."""
        return tuple(f"{flag(name)} ({FLAGS[name]})" for name in self.names)


@dataclass(frozen=True, slots=True)
class Given:
    """Facts that a person gave, None where not. Raises ValueError for a value out of bounds, by its flag."""

    image_size: int | None = None
    timesteps: int | None = None
    beta_schedule: str | None = None
    variance: str | None = None
    prediction: str | None = None
    heads: int | None = None
    head_width: int | None = None
    attention_order: str | None = None
    rescale_timesteps: str | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{flag(name)} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= largest:
                raise ValueError(f"{flag(name)} must be 1..{largest}, got {value}")
        if self.heads is not None and self.head_width is not None:
            raise ValueError(f"--heads or --head-width, not both: got {self.heads} and {self.head_width}")

    def check(self, what: str, needed: Iterable[str], taken: Iterable[str] = ()) -> None:
        """Raise MissingFacts for needed ones that were not given, ValueError for others that this format has not."""
        needed = tuple(needed)
        known = {*needed, *taken}
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if others := [name for name in given if name not in known]:
            raise ValueError(f"{flag(others[0])} says nothing about {what}, which has it in the file or not at all")
        if missing := [name for name in needed if name not in given]:
            raise MissingFacts(what, missing)
