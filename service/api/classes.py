"""The classes that a request names, by number or by name in whatever case, as the model's numbers. Pure."""

from collections.abc import Mapping
from functools import lru_cache

from tminus.service.api.fields import DIGITS
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo

MAX_NAMES_SHOWN = 20


def class_numbers(
    given: int | str | list[int | str | None] | None, n: int, model: ModelInfo
) -> tuple[int | None, ...] | None:
    """The class of each of n images, None for no class; None for a model without classes. Raises InvalidField.

    given: one class for all images, or a list of n.
    """
    if not model.conditional:
        if given is not None:
            raise InvalidField.of("class_label", "absent: this model has no classes", given)
        return None
    if isinstance(given, list) and len(given) != n:
        wanted = f"one class or a list of n={n}"
        detail = f"class_label must be {wanted}, got a list of {len(given)}"
        raise InvalidField(detail, field="class_label", value=given, bound=wanted)
    numbers = tuple(_number(label, model) for label in (given if isinstance(given, list) else [given] * n))
    if model.null_class is None and None in numbers:
        raise InvalidField.of("class_label", f"given, {class_bound(model)}", given)
    return numbers


def class_bound(model: ModelInfo) -> str:
    """What class_label must be, in words."""
    return f"a class, or a list of n of them: {known_classes(model.class_names)}"


def known_classes(names: tuple[str, ...]) -> str:
    """The classes that there are, in words: all by number, and by name unless they are many."""
    if not names:
        return "none, as this model has no classes"
    shown = ", ".join(names) if len(names) <= MAX_NAMES_SHOWN else "a name that GET /model lists"
    return f"0..{len(names) - 1} or {shown}"


def find_class(label: int | str, names: tuple[str, ...]) -> int | None:
    """The class of this name, in whatever case, or else of this number; None if there is none."""
    if isinstance(label, str) and (named := _numbers_by_name(names).get(label.casefold())) is not None:
        return named
    number = int(label) if isinstance(label, int) or (len(label) < 10 and DIGITS.fullmatch(label)) else -1
    return number if 0 <= number < len(names) else None


def _number(label: int | str | None, model: ModelInfo) -> int | None:
    if label is None:
        return None
    if (number := find_class(label, model.class_names)) is None:
        raise InvalidField.of("class_label", class_bound(model), label)
    return number


@lru_cache(maxsize=4)  # a request may name a thousand images, and a model a thousand classes
def _numbers_by_name(names: tuple[str, ...]) -> Mapping[str, int]:
    return {name.casefold(): number for number, name in enumerate(names)}
