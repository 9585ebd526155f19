"""The input and output of the readers of foreign formats: facts from the user, and a checkpoint."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tminus.model.checkpoint import Labels
from tminus.model.denoiser import NetConfig
from tminus.model.files import CheckpointError
from tminus.model.formats.flags import FACTS, OF_SIGMA, flag
from tminus.model.noise import NoiseConfig

HO_TIMESTEPS = 1000  # T of Ho et al.'s linear betas; some projects rescale these betas for another T
HO_BETAS = (1e-4, 0.02)
CLIPS = "x_0 is clipped to [-1, 1]"


class MissingFacts(CheckpointError):
    """Raised if a file is recognised but lacks facts. `names` are the facts that the user must give."""

    def __init__(self, what: str, names: Iterable[str]) -> None:
        self.what, self.names = what, tuple(names)
        super().__init__(f"{what} does not say all that is needed; give {'; '.join(self.asked)}")

    @property
    def asked(self) -> tuple[str, ...]:
        """The flags of the missing facts, each with its help text."""
        return tuple(f"{flag(name)} ({FACTS[name].text})" for name in self.names)


class FactsError(ValueError):
    """Raised if a fact is out of bounds, or does not apply to the format. The message names its flag."""


@dataclass(frozen=True, slots=True)
class GivenFacts:
    """Facts from the user, or None if not given. Raises FactsError for values outside the bounds in FACTS."""

    image_size: int | None = None
    timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    variance: str | None = None
    prediction: str | None = None
    heads: int | None = None
    head_width: int | None = None
    attention_order: str | None = None
    rescale_timesteps: str | None = None

    def __post_init__(self) -> None:
        for name, fact in FACTS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if fact.choices and value not in fact.choices:
                raise FactsError(f"{flag(name)} must be {' or '.join(fact.choices)}, got {value!r}")
            if fact.largest is not None and not (1 if fact.whole else 0) <= value <= fact.largest:
                least = "1" if fact.whole else "0"
                raise FactsError(f"{flag(name)} must be {least}..{fact.largest:g}, got {value}")
        if self.heads is not None and self.head_width is not None:
            raise FactsError(f"--heads or --head-width, not both: got {self.heads} and {self.head_width}")

    def check(self, what: str, needed: Iterable[str], taken: Iterable[str] = ()) -> None:
        """Raise MissingFacts if a needed fact is missing, and FactsError for a fact that does not apply."""
        needed = tuple(needed)
        known = {*needed, *taken}
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if others := [name for name in given if name not in known]:
            raise FactsError(f"{flag(others[0])} says nothing about {what}, which has it in the file or not at all")
        if missing := [name for name in needed if name not in given]:
            raise MissingFacts(what, missing)

    def needed_for_noise(self, *, learned: bool = False) -> list[str]:
        """Return the facts needed to make the noise schedule, for a file that does not contain it."""
        needed = ["timesteps", "beta_schedule"]
        if self.beta_schedule in ("scaled_linear", "sigmoid"):  # Projects differ in the first and last beta.
            needed += ["beta_start", "beta_end"]
        return [*needed, "prediction", *([] if learned else ["variance"])]

    def taken_for_noise(self) -> list[str]:
        """Return the optional facts about the noise schedule."""
        return [] if self.beta_schedule == "squaredcos_cap_v2" else ["beta_start", "beta_end"]

    def check_of_betas(self) -> None:
        """Raise FactsError if the prediction belongs to a network that has sigmas instead of betas."""
        if self.prediction in OF_SIGMA:
            raise FactsError(f"--prediction {self.prediction} is for networks of OpenAI's consistency_models")

    def noise(self, *, learned: bool = False, scaled: bool = False, clip: bool = True) -> NoiseConfig:
        """Make the noise schedule from the given facts, which must include all needed ones.

        With `scaled`, linear betas are multiplied by 1000 / T.
        """
        assert self.timesteps is not None
        self.check_of_betas()
        scale = HO_TIMESTEPS / self.timesteps if scaled and self.beta_schedule == "linear" else 1
        return NoiseConfig(
            num_train_timesteps=self.timesteps,
            beta_schedule=str(self.beta_schedule),
            beta_start=(HO_BETAS[0] if self.beta_start is None else self.beta_start) * scale,
            beta_end=(HO_BETAS[1] if self.beta_end is None else self.beta_end) * scale,
            prediction_type=self.prediction or "epsilon",
            variance_type="learned_range" if learned else self.variance or "fixed_large",
            clip_sample=clip,
        )

    def noise_notes(self, noise: NoiseConfig) -> tuple[str, ...]:
        """Return notes on assumed defaults, for the user to check."""
        betas = f"betas from {noise.beta_start:g} to {noise.beta_end:g}"
        usual = self.beta_schedule == "linear" and (self.beta_start is None or self.beta_end is None)
        return (*((betas,) if usual else ()), *((CLIPS,) if noise.clip_sample else ()))


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted checkpoint, to be saved with `save_checkpoint`."""

    format: str  # shown to users
    unet: NetConfig
    state: Mapping[str, Tensor]
    noise: NoiseConfig
    labels: Labels
    notes: tuple[str, ...] = ()
    """Assumptions about facts that the files do not state, for the user to check."""


def numbered(classes: int | None, *, null_class: bool = False) -> Labels:
    """Return labels for numbered classes. With `null_class`, the last class is the null class."""
    if classes is None:
        return Labels()
    names = tuple(map(str, range(classes - null_class)))
    return Labels(names, classes - 1 if null_class else None)
