"""What the configurations of other projects' networks have in common."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from tminus.model.files import given_fields

MAX_NUMBER = 2**31 - 1
MAX_LIST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherConfig:
    """Images, channels and classes of a network. Raises ValueError, naming the field and its value."""

    class_name: ClassVar[str] = ""

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    num_class_embeds: int | None = None
    """The null class among them, which is the last."""

    def require(self, ok: bool, field: str, bound: str) -> None:
        """Raise ValueError unless it is ok."""
        if not ok:
            raise ValueError(f"{self.class_name} config: {field} must be {bound}, got {getattr(self, field)!r:.100}")

    def require_numbers(self, *fields: str) -> None:
        """Each of these fields must be a positive integer."""
        for field in fields:
            self.require(_is_positive(getattr(self, field)), field, "a positive integer")

    def require_lists(self, *fields: str) -> None:
        """Each of these fields must be a list of positive integers."""
        for field in fields:
            value = getattr(self, field)
            ok = isinstance(value, tuple) and 1 <= len(value) <= MAX_LIST and all(map(_is_positive, value))
            self.require(ok, field, f"a list of 1 to {MAX_LIST} positive integers")

    def __post_init__(self) -> None:
        self.require_numbers("sample_size", "in_channels", "out_channels")
        if self.num_class_embeds is not None:
            self.require_numbers("num_class_embeds")

    @property
    def size_px(self) -> tuple[int, int]:
        """See NetConfig."""
        return self.sample_size, self.sample_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json. Raises ValueError for a field that is not known, and one that is missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in given_fields(config).items()}
        if unknown := values.keys() - known:
            name = min(unknown)
            raise ValueError(
                f"{cls.class_name} config: {name}={values[name]!r:.100} is not something it is known to have"
            )
        try:
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:  # one is missing, or of a type that no check expects
            raise ValueError(f"{cls.class_name} config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """See NetConfig."""
        return {"_class_name": self.class_name, **dataclasses.asdict(self)}


def _is_positive(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_NUMBER
