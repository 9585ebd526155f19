"""A base class for configurations that are read from JSON and validated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, get_type_hints

MAX_COUNT = 2**31 - 1  # largest signed 32-bit integer
LARGEST = 1e30  # largest magnitude of a number
MAX_LIST = 16


def is_count(value: object) -> bool:
    """Return True for an integer from 1 to MAX_COUNT. Booleans are not counts."""
    return type(value) is int and 1 <= value <= MAX_COUNT


def is_number(value: object) -> bool:
    """Return True for a number with a magnitude of at most LARGEST. Booleans are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


@dataclass(frozen=True, slots=True)
class Bound:
    """A constraint on a field, placed in the field's annotation: a description and a test."""

    text: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Bound("a positive integer", is_count)]
OptionalCount = Annotated[int | None, Bound("a positive integer or null", lambda v: v is None or is_count(v))]
Counts = Annotated[
    tuple[int, ...],
    Bound(
        f"a list of 1 to {MAX_LIST} positive integers",
        lambda v: isinstance(v, tuple) and 1 <= len(v) <= MAX_LIST and all(map(is_count, v)),
    ),
]
Number = Annotated[float, Bound("a number", is_number)]
PositiveNumber = Annotated[float, Bound("a positive number", lambda v: is_number(v) and v > 0)]
Flag = Annotated[bool, Bound("true or false", lambda v: isinstance(v, bool))]


class Checked:
    """Base class for frozen dataclasses that validate their fields when they are created.

    Raises ValueError for an invalid field.
    """

    __slots__ = ()

    KIND: ClassVar[str] = ""
    """Prefix for error messages."""

    def __post_init__(self) -> None:
        """Check the bounds in the annotations. Subclasses with more checks call this method first."""
        for field, hint in get_type_hints(type(self), include_extras=True).items():
            for bound in getattr(hint, "__metadata__", ()):
                if isinstance(bound, Bound):
                    self.require(bound.holds(getattr(self, field)), field, bound.text)

    def require(self, ok: bool, field: str, bound: str) -> None:
        """Raise ValueError unless `ok`. The message states the field, the bound and the value."""
        if not ok:
            raise ValueError(f"{self.KIND}{field} must be {bound}, got {getattr(self, field)!r:.100}")

    def require_among(self, field: str, *names: str) -> None:
        """Raise ValueError unless the field's value is one of these names."""
        value = getattr(self, field)
        self.require(isinstance(value, str) and value in names, field, f"among {', '.join(names)}")

    def require_names(self, field: str, count: int, *names: str) -> None:
        """Raise ValueError unless the field is a list of `count` items, all of them from `names`."""
        value = getattr(self, field)
        ok = isinstance(value, tuple) and len(value) == count and all(name in names for name in value)
        self.require(ok, field, f"a list of {count} names among {', '.join(names)}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], **more: Any) -> Self:
        """Create a config from parsed JSON. Raises ValueError for an invalid, missing or unknown field."""
        try:
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}, **more)
        except TypeError as error:
            raise ValueError(f"{cls.KIND}{error}") from error


def given_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the explicitly given fields of a diffusers config.

    This leaves out private fields, whose names begin with `_`, and fields listed in `_use_default_values`. Raises
    ValueError if `_use_default_values` is not a list of names.
    """
    defaulted = config.get("_use_default_values", [])
    if not isinstance(defaulted, list) or not all(isinstance(name, str) for name in defaulted):
        raise ValueError(f"_use_default_values must be a list of names, got {defaulted!r:.100}")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in defaulted}


def is_off(value: object) -> bool:
    """Return True for null and false, the values that turn an unknown field off. 0 does not count."""
    return value is None or value is False
