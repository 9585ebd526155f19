"""What each parameter must be: a bound is stated once, as JSON Schema, then checked, described and worded. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.classes import class_bound
from tminus.service.model_info import Limits, ModelInfo

Schema = dict[str, Any]  # a part of a JSON Schema

BOUND = "x-bound"  # in the JSON schema of a field: what it must be, in words, where they do not follow from its type
BIT_DEPTHS = (8, 16, 32)
MAX_ITEMS = 16  # of a list that is looked at, unless more are allowed


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound that narrows a parameter further than its own field."""

    integer: Schema = field(default_factory=dict)  # its values that are integers, or the items of its lists
    string: Schema = field(default_factory=dict)
    array: Schema = field(default_factory=dict)
    words: str = ""  # where they do not follow from the rest

    def of_kind(self, kind: str) -> Schema:
        """Return what narrows the values of a type of JSON Schema."""
        return {"integer": self.integer, "string": self.string, "array": self.array}.get(kind, {})

    def allows(self, value: int | str) -> bool:
        """Whether a value of the right type is in the bound."""
        schema = self.string if isinstance(value, str) else self.integer
        if "enum" in schema:
            return value in schema["enum"]
        return isinstance(value, str) or schema["minimum"] <= value <= schema["maximum"]


Bounds = Mapping[str, Bound]


def bit_depths(channels: int) -> tuple[int, ...]:
    """List the bit depths of images. Only grey PNGs have 16 bits."""
    return BIT_DEPTHS if channels == 1 else (8, 32)


def bounds_of(model: ModelInfo, limits: Limits) -> Bounds:
    """Return the bounds that depend on the model and the settings, by parameter."""
    return _bounds(model.num_timesteps, model.samplers, model.class_names, model.channels, limits.max_n)


@lru_cache(maxsize=64)  # the same for each request of a model
def _bounds(
    num_timesteps: int, samplers: tuple[str, ...], class_names: tuple[str, ...], channels: int, max_n: int
) -> Bounds:
    last = num_timesteps - 1
    timesteps = {"minimum": 0, "maximum": last}
    return {
        "n": Bound({"minimum": 1, "maximum": max_n}),
        "steps": Bound({"minimum": 1, "maximum": num_timesteps}),
        "sampler": Bound(string={"enum": list(samplers)}),
        "class_label": Bound(
            {"minimum": 0, "maximum": max(0, len(class_names) - 1)},
            array={"minItems": 1, "maxItems": max_n},
            words=class_bound(class_names),
        ),
        "bit_depth": Bound(
            {"enum": list(bit_depths(channels))},
            words="8, 16 or 32" if channels == 1 else f"8 or 32 for {channels} channels; 16 is for one",
        ),
        "guidance_interval": Bound(
            timesteps,
            array={"minItems": 2, "maxItems": 2},
            words=f"two integers [lo, hi] with 0 <= lo <= hi <= {last}",
        ),
        "keep": Bound(
            timesteps,
            array={"minItems": 1, "maxItems": last + 1, "uniqueItems": True},
            words=f"a list of at most {last + 1} numbers of passes",
        ),
        "timestep_spacing": Bound(string={"enum": list(SPACINGS)}),
        "t": Bound(timesteps),
    }


def max_items(schema: Schema, bound: Bound) -> int:
    """Return how many items of a list are looked at, at most. schema: of its field."""
    kinds = (bound.array, *schema.get("anyOf", [schema]))
    return max(MAX_ITEMS, *(int(each.get("maxItems", 0)) for each in kinds))


def words_of(schema: Schema, bound: Bound) -> str:
    """Say what a parameter must be. schema: of its field."""
    kind = next(each for each in schema.get("anyOf", [schema]) if each["type"] != "null")
    if words := bound.words or schema.get(BOUND) or kind.get(BOUND):
        return str(words)
    kind = kind | bound.of_kind(kind["type"])
    if "enum" in kind:
        return f"one of {', '.join(kind['enum'])}"
    if kind["type"] == "string":
        return f"text of at most {kind['maxLength']} characters" if "maxLength" in kind else "text"
    if kind["type"] == "boolean":
        return "true or false"
    noun = {"integer": "an integer", "number": "a number"}[kind["type"]]
    low, most = (_number(kind.get(name)) for name in ("minimum", "maximum"))
    if "exclusiveMinimum" in kind:
        return f"{noun} above {_number(kind['exclusiveMinimum'])}, at most {most}"
    if most:
        return f"{noun} in {low}..{most}"
    return f"{noun} of at least {low}" if low else noun


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
