"""The settings that a checkpoint recommends for sampling, from tminus.json. No torch: the service tells them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_GUIDANCE = 50.0


@dataclass(frozen=True, slots=True)
class Recommended:
    """What to sample with; guidance 1 is off."""

    sampler: str
    steps: int
    guidance: float = 1.0

    @classmethod
    def from_json(
        cls, value: object, *, samplers: Sequence[str], num_timesteps: int, has_null_class: bool
    ) -> "Recommended":
        """Check what tminus.json holds. Raises ValueError, which names the member, its bound and its value."""

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
        require(sampler in samplers, "recommended sampler", f"one of {', '.join(samplers)}", sampler)
        whole = type(steps) is int and 1 <= steps <= num_timesteps  # True is an int, and no number of steps
        require(whole, "recommended steps", f"an integer in 1..{num_timesteps}", steps)
        number = type(guidance) in (int, float) and 0 <= guidance <= MAX_GUIDANCE
        require(number, "recommended guidance", f"a number in 0..{MAX_GUIDANCE:g}", guidance)
        require(guidance == 1 or has_null_class, "recommended guidance", "1 (off) without a null_class", guidance)
        return cls(sampler, steps, float(guidance))
