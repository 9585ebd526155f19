"""Facts about the samplers: number of passes, source and advice. Does not import torch.

The service uses these facts to count network passes. The coefficients are in model/solvers.py.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

TABLE = "table"  # spacing of samplers that take their timesteps from one of the checkpoint's tables
MAX_GUIDANCE = 50.0
MAX_RUNGS = 16


@dataclass(frozen=True, slots=True)
class SamplerFacts:
    """What is known about a sampler, apart from its coefficients."""

    when: str  # advice for users on when to choose the sampler
    source: str
    good_steps: int  # default number of steps
    passes_per_step: int = 1
    passes_to_start: int = 0  # extra passes at the start, if there are more than `steps_to_start` steps
    steps_to_start: int = 1
    leaves_out_cleanest: bool = False  # leading and linspace choose steps + 1 timesteps and drop the cleanest
    fractional: bool = False  # True if the sampler can use fractional timesteps
    spacing: str | None = None  # default timestep spacing, see NoiseConfig.default_spacing
    # Whether each step except the last adds fresh noise; "eta" means only if eta is above 0.
    noise: Literal["none", "eta", "always"] = "none"
    looks_back: int = 0  # how many earlier predictions of x_0 a noisy step uses
    needs_signal: bool = False  # True if the sampler cannot start from pure noise (alpha_bar = 0)
    # True if set_alpha_to_one=False makes the last step end at alpha_bar_0 instead of 1.
    may_end_at_alpha_bar_0: bool = False

    @property
    def can_teach(self) -> bool:
        """True if the sampler can serve as the teacher of a table or a student.

        A teacher must run without fresh noise and take one pass per step.
        """
        return self.noise != "always" and self.passes_per_step == 1 and not self.passes_to_start

    def num_passes(self, steps: int) -> int:
        """Return the number of network passes for one image without guidance. The last step always takes one pass."""
        if steps < 2:
            return steps
        return self.passes_per_step * (steps - 1) + 1 + (self.passes_to_start if steps > self.steps_to_start else 0)

    def max_steps(self, num_timesteps: int) -> int:
        """Return the largest number of steps that needs no more than `num_timesteps` passes."""
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
TABLE_SAMPLERS = ("tuned", "consistency")  # only for checkpoints with tables (sampler_tables.py)
SAMPLERS = tuple(name for name in SAMPLER_FACTS if name not in TABLE_SAMPLERS)  # available for every checkpoint
TEACHERS = tuple(name for name in SAMPLERS if SAMPLER_FACTS[name].can_teach)  # for `tminus tune` and `tminus distill`


@dataclass(frozen=True, slots=True)
class Recommended:
    """The recommended settings of a checkpoint. Guidance 1 means no guidance."""

    sampler: str
    steps: int
    guidance: float = 1.0

    @classmethod
    def from_json(cls, value: object, num_timesteps: int, *, has_null_class: bool, what: str = "recommended") -> Self:
        """Validate an object of tminus.json. what: the name of the object in errors.

        Raises ValueError with the field, the allowed values and the value found.
        """
        names = list(cls.__dataclass_fields__)
        _require(isinstance(value, dict), what, f"an object with {', '.join(names)}", value)
        assert isinstance(value, dict)
        given: dict[str, Any] = {"sampler": None, "steps": None, "guidance": 1.0} | value
        for name in given:
            _require(name in names, f"each member of {what}", f"one of {', '.join(names)}", name)
        sampler, steps, guidance = given["sampler"], given["steps"], given["guidance"]
        known = isinstance(sampler, str) and sampler in SAMPLER_FACTS
        _require(known, f"{what} sampler", f"one of {', '.join(SAMPLER_FACTS)}", sampler)
        most = SAMPLER_FACTS[sampler].max_steps(num_timesteps)
        whole = type(steps) is int and 1 <= steps <= most  # type() excludes bool, a subclass of int
        _require(whole, f"{what} steps", f"an integer in 1..{most}", steps)
        number = type(guidance) in (int, float) and 0 <= guidance <= MAX_GUIDANCE
        _require(number, f"{what} guidance", f"a number in 0..{MAX_GUIDANCE:g}", guidance)
        _require(guidance == 1 or has_null_class, f"{what} guidance", "1 (off) without a null_class", guidance)
        return cls(**given | {"guidance": float(guidance)})

    @property
    def passes(self) -> int:
        """The number of network passes for one image. A guided pass counts twice."""
        return SAMPLER_FACTS[self.sampler].num_passes(self.steps) * (1 if self.guidance == 1 else 2)

    def __str__(self) -> str:
        """Return a description for users, such as `20 steps of dpmpp_2m, guidance 1.5`."""
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.steps} step{'s' if self.steps != 1 else ''} of {self.sampler}{guided}"


@dataclass(frozen=True, slots=True)
class Rung(Recommended):
    """One setting of a checkpoint's ladder, which goes from the best setting to the fastest."""

    model: str | None = None  # name of the served model, such as a student; None for the checkpoint itself
    # Fréchet distances that `tminus evaluate` measured, in the classifier's features and in pixels; None if unknown.
    distance: float | None = None
    pixel_distance: float | None = None

    @property
    def distances(self) -> tuple[float, float]:
        """Both distances, for comparison. An unknown one counts as infinite."""
        distance, in_pixels = (math.inf if each is None else each for each in (self.distance, self.pixel_distance))
        return distance, in_pixels


def ladder_from_json(value: object, num_timesteps: int, *, has_null_class: bool) -> tuple[Rung, ...]:
    """Validate the `ladder` list of tminus.json. Raises ValueError, as Recommended.from_json does."""
    listed = isinstance(value, list) and 1 <= len(value) <= MAX_RUNGS
    _require(listed, "ladder", f"a list of 1 to {MAX_RUNGS} settings", value)
    assert isinstance(value, list)
    rungs: list[Rung] = []
    for k, each in enumerate(value):
        what = f"ladder[{k}]"
        rung = Rung.from_json(each, num_timesteps, has_null_class=has_null_class, what=what)
        named = rung.model is None or (isinstance(rung.model, str) and bool(rung.model))
        _require(named, f"{what} model", "the name of a model", rung.model)
        for name in ("distance", "pixel_distance"):
            found = getattr(rung, name)
            number = found is None or (type(found) in (int, float) and 0 <= found < math.inf)
            _require(number, f"{what} {name}", "a number, 0 or more", found)
        if rungs:
            bound = f"fewer than {rungs[-1].passes} passes, those of the setting before it"
            _require(rung.passes < rungs[-1].passes, what, bound, f"{rung}, {rung.passes} passes")
        rungs.append(rung)
    return tuple(rungs)


def ladder_of(measured: Iterable[Rung]) -> tuple[Rung, ...]:
    """Return the ladder of settings with known distances, from the most passes to the fewest.

    A setting is left out if another one has no more passes and no larger distances. Of two settings with the same
    number of passes, the one with the smaller `distance` stays.
    """
    rungs: list[Rung] = []
    for rung in sorted(measured, key=lambda rung: (rung.passes, rung.distances)):
        beaten = any(all(map(operator.le, other.distances, rung.distances)) for other in rungs)
        if not beaten and not (rungs and rungs[-1].passes == rung.passes):
            rungs.append(rung)
    return tuple(reversed(rungs))


def default_ladder(own: Recommended, tables: Iterable[Recommended]) -> tuple[Rung, ...]:
    """Return the ladder of a checkpoint that states none.

    It has the checkpoint's own settings, the same sampler at half the steps and so on down to its `good_steps`, and
    then the tables of the same guidance that take fewer passes. tables: the settings of the checkpoint's tables.
    """
    rungs = [Rung(own.sampler, own.steps, own.guidance)]
    least = own.steps if own.sampler in TABLE_SAMPLERS else SAMPLER_FACTS[own.sampler].good_steps
    while rungs[-1].steps > least:
        rungs.append(Rung(own.sampler, max(least, rungs[-1].steps // 2), own.guidance))
    for table in sorted(tables, key=lambda table: table.steps, reverse=True):
        rung = Rung(table.sampler, table.steps, table.guidance)
        if rung.guidance == own.guidance and rung.passes < rungs[-1].passes:
            rungs.append(rung)
    return tuple(rungs)


def _require(ok: bool, name: str, bound: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {bound}, got {got!r:.100}")


def usual_settings(num_timesteps: int, sampler: str = "dpmpp_2m") -> Recommended:
    """Return a sampler's default settings, for a checkpoint that recommends none.

    The number of steps is reduced if the noise schedule has fewer timesteps. Guidance is off.
    """
    facts = SAMPLER_FACTS[sampler]
    return Recommended(sampler, min(facts.good_steps, facts.max_steps(num_timesteps)))
