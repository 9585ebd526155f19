"""Facts about the samplers: passes, timesteps, sources and advice. Imports no torch.

The service counts passes from these facts. The coefficients are in model/solvers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TABLE = "table"  # spacing of samplers whose timesteps come from a table of the checkpoint
MAX_GUIDANCE = 50.0


@dataclass(frozen=True, slots=True)
class SamplerFacts:
    """Facts about one sampler."""

    when: str  # advice for users
    source: str
    good_steps: int  # default steps of a request without steps
    passes_per_step: int = 1
    passes_to_start: int = 0  # extra passes in total of the first `steps_to_start` steps, if more steps follow
    steps_to_start: int = 1
    leaves_out_cleanest: bool = False  # leading and linspace drop the cleanest of steps + 1 points, as in diffusers
    fractional: bool = False  # True if the sampler uses fractional timesteps when the network accepts them
    spacing: str | None = None  # default spacing if the config is for another kind of sampler; None: the config's
    # Fresh noise in all steps but the last. "eta" adds noise only if eta is above 0.
    noise: Literal["none", "eta", "always"] = "none"
    looks_back: int = 0  # number of earlier predictions of x_0 in the mean of a step with noise
    needs_signal: bool = False  # True if the first step is undefined at alpha_bar = 0
    # True if the last step ends at alpha_bar_0 instead of 1 when the config sets set_alpha_to_one to false.
    may_end_at_alpha_bar_0: bool = False

    @property
    def can_teach(self) -> bool:
        """True if x_T determines x_0 and each step takes one pass. Only such samplers can teach tables and students."""
        return self.noise != "always" and self.passes_per_step == 1 and not self.passes_to_start

    def num_passes(self, steps: int) -> int:
        """Return the network passes of one row, unguided. The last step always takes one pass."""
        if steps < 2:
            return steps
        return self.passes_per_step * (steps - 1) + 1 + (self.passes_to_start if steps > self.steps_to_start else 0)

    def max_steps(self, num_timesteps: int) -> int:
        """Return the largest number of steps that takes at most T passes, where T is num_timesteps."""
        most = (num_timesteps - 1 - self.passes_to_start) // self.passes_per_step + 1
        if most > self.steps_to_start:
            return most
        return max(1, min(self.steps_to_start, (num_timesteps - 1) // self.passes_per_step + 1))


SAMPLER_FACTS: Mapping[str, SamplerFacts] = {
    "ddpm": SamplerFacts(
        "the reference: it needs hundreds of steps",
        "Ho et al. 2020, algorithm 2",
        100,
        noise="always",
    ),
    "ddim": SamplerFacts(
        "no fresh noise (eta 0), or some (eta up to 1): 50 steps",
        "Song et al. 2021, eq. 12",
        50,
        noise="eta",
        may_end_at_alpha_bar_0=True,
    ),
    "dpmpp_2m": SamplerFacts(
        "the one to begin with: 20 steps",
        "Lu et al. 2022, DPM-Solver++ 2M",
        20,
        leaves_out_cleanest=True,
        spacing="karras",
    ),
    "dpmpp_3m": SamplerFacts(
        "dpmpp_2m of third order: 30 steps and more; in 20, dpmpp_2m is better",
        "Lu et al. 2022, DPM-Solver++ 3M",
        30,
        leaves_out_cleanest=True,
        spacing="karras",
    ),
    "dpmpp_2m_sde": SamplerFacts(
        "dpmpp_2m with fresh noise at each step: 20 steps and more",
        "Lu et al. 2022, SDE-DPM-Solver++ 2M",
        30,
        leaves_out_cleanest=True,
        spacing="karras",
        noise="always",
        looks_back=1,
    ),
    "unipc": SamplerFacts(
        "dpmpp_2m with a corrector that costs no pass: 10 to 20 steps",
        "Zhao et al. 2023, UniPC, order 2, B(h) = e^h - 1",
        10,
        leaves_out_cleanest=True,
        spacing="karras",
    ),
    "deis": SamplerFacts(
        "multistep in eps instead of x_0: 15 steps and more",
        "Zhang & Chen 2023, DEIS",
        15,
        leaves_out_cleanest=True,
        spacing="karras",
    ),
    "plms": SamplerFacts(
        "multistep over equal steps of t, one pass more than steps: 10 to 50 steps",
        "Liu et al. 2022, PNDM without its Runge-Kutta start",
        50,
        passes_to_start=1,
        needs_signal=True,
        may_end_at_alpha_bar_0=True,
    ),
    "pndm": SamplerFacts(
        "plms after three Runge-Kutta steps: 50 steps, 59 passes",
        "Liu et al. 2022, PNDM, algorithm 2",
        50,
        passes_to_start=9,
        steps_to_start=3,
        needs_signal=True,
        may_end_at_alpha_bar_0=True,
    ),
    "euler": SamplerFacts(
        "ddim at exact noise levels: 40 steps and more",
        "Karras et al. 2022, first order",
        40,
        fractional=True,
        spacing="karras",
    ),
    "heun": SamplerFacts(
        "second order, two passes a step: 25 steps, 49 passes",
        "Karras et al. 2022, algorithm 1",
        25,
        passes_per_step=2,
        fractional=True,
        spacing="karras",
        needs_signal=True,
    ),
    "tuned": SamplerFacts("fitted to this checkpoint: the best in few steps", "tminus tune", 8, spacing=TABLE),
    "consistency": SamplerFacts(
        "the only one of a student: one to four steps",
        "Song et al. 2023, algorithm 1",
        2,
        spacing=TABLE,
        noise="always",
    ),
}
TABLE_SAMPLERS = ("tuned", "consistency")  # only for checkpoints with tables, see sampler_tables.py
SAMPLERS = tuple(name for name in SAMPLER_FACTS if name not in TABLE_SAMPLERS)  # available for every checkpoint
TEACHERS = tuple(name for name in SAMPLERS if SAMPLER_FACTS[name].can_teach)  # for `tminus tune` and `tminus distill`


@dataclass(frozen=True, slots=True)
class Recommended:
    """The recommended settings of a checkpoint. Guidance 1 is off."""

    sampler: str
    steps: int
    guidance: float = 1.0

    @classmethod
    def from_json(cls, value: object, num_timesteps: int, *, has_null_class: bool) -> "Recommended":
        """Validate `recommended` of tminus.json. Raises ValueError with the field, its bound and its value."""

        def require(ok: bool, name: str, bound: str, got: object) -> None:
            if not ok:
                raise ValueError(f"{name} must be {bound}, got {got!r:.100}")

        names = list(cls.__dataclass_fields__)
        require(isinstance(value, dict), "recommended", f"an object with {', '.join(names)}", value)
        assert isinstance(value, dict)
        given: dict[str, Any] = {"sampler": None, "steps": None, "guidance": 1.0} | value
        for name in given:
            require(name in names, "each member of recommended", f"one of {', '.join(names)}", name)
        sampler, steps, guidance = (given[name] for name in names)
        known = isinstance(sampler, str) and sampler in SAMPLER_FACTS
        require(known, "recommended sampler", f"one of {', '.join(SAMPLER_FACTS)}", sampler)
        most = SAMPLER_FACTS[sampler].max_steps(num_timesteps)
        whole = type(steps) is int and 1 <= steps <= most  # type() excludes True, which is an int
        require(whole, "recommended steps", f"an integer in 1..{most}", steps)
        number = type(guidance) in (int, float) and 0 <= guidance <= MAX_GUIDANCE
        require(number, "recommended guidance", f"a number in 0..{MAX_GUIDANCE:g}", guidance)
        require(guidance == 1 or has_null_class, "recommended guidance", "1 (off) without a null_class", guidance)
        return cls(sampler, steps, float(guidance))

    def __str__(self) -> str:
        """Return text for users: `20 steps of dpmpp_2m, guidance 1.5`."""
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.steps} step{'s' if self.steps != 1 else ''} of {self.sampler}{guided}"


def usual_settings(num_timesteps: int, sampler: str = "dpmpp_2m") -> Recommended:
    """Return a sampler's default settings, unguided, for a checkpoint without recommended settings.

    num_timesteps limits the number of steps.
    """
    facts = SAMPLER_FACTS[sampler]
    return Recommended(sampler, min(facts.good_steps, facts.max_steps(num_timesteps)))
