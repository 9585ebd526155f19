"""Converts the classes in a request, given by number or by case-insensitive name, to the model's class numbers.

A JSON number means the same class as its digits in text, in a query or in a prompt. Prompts exist for clients of
text-to-image models; a prompt is a class's name or number, or empty.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo

MAX_NAMES_SHOWN = 20
DIGITS = re.compile(r"[0-9]+")
NAME, NUMBER = "name:", "number:"
BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")


def class_numbers(
    given: int | str | list[int | str | None] | None, n: int, model: ModelInfo
) -> tuple[int | None, ...] | None:
    """Return the class number of each of n images; None stands for no class. Raises InvalidField.

    given: one class for all images, or a list of n classes. If the model has no classes, the whole result is None.
    """
    if not model.conditional:
        if given is not None:
            raise InvalidField.of("class_label", "absent: this model has no classes", given)
        return None
    if isinstance(given, list) and len(given) != n:
        wanted = f"one class or a list of n={n}"
        detail = f"class_label must be {wanted}, got a list of {len(given)}"
        raise InvalidField(detail, field="class_label", value=given, bound=wanted)
    numbers = tuple(_number(label, model) for label in (given if isinstance(given, list) else [given]))
    numbers = numbers if isinstance(given, list) else numbers * n
    if model.null_class is None and None in numbers:
        raise InvalidField.of("class_label", f"given, {class_bound(model.class_names)}", given)
    return numbers


def class_bound(names: tuple[str, ...]) -> str:
    """Describe in words which values of class_label are valid."""
    return f"a class, or a list of n of them: {known_classes(names)}"


def known_classes(names: tuple[str, ...]) -> str:
    """Describe a model's classes in words: the range of numbers, and the names, unless there are too many."""
    if not names:
        return "none, as this model has no classes"
    shown = ", ".join(names) if len(names) <= MAX_NAMES_SHOWN else "a name that GET /model lists"
    return f"0..{len(names) - 1} or {shown}"


def find_class(label: int | str, names: tuple[str, ...], field: str = "class_label") -> int | None:
    """Return the number of a class, given its case-insensitive name or its number, or None if there is no such class.

    Raises InvalidField for `field` if the label is the name of one class and the number of another. The prefix `name:`
    or `number:` on the label says which is meant.
    """
    text = str(label)
    if text.casefold().startswith(NAME):
        return _named(text[len(NAME) :], names)
    if text.casefold().startswith(NUMBER):
        return _numbered(text[len(NUMBER) :], names)
    named, numbered = _named(text, names), _numbered(text, names)
    if named is None or numbered in (None, named):
        return numbered if named is None else named
    readings = f"{NAME}{names[named]} (class number {named}) or {NUMBER}{numbered} (the class named {names[numbered]})"
    raise InvalidField.of(field, f"{readings}: where names are numbers, {text} may be either", label)


def class_label_of(number: int | None, names: tuple[str, ...]) -> int | str | None:
    """Return an unambiguous label for a class: its number, with the prefix `number:` if another class has that name.

    None stands for no class.
    """
    return number if number is None or _named(str(number), names) in (None, number) else f"{NUMBER}{number}"


def _named(text: str, names: tuple[str, ...]) -> int | None:
    """Return the class with this name. Digits also match a single numeric name of equal value: 1 matches 01."""
    by_name, by_value = _numbers_by_name(names)
    if (exact := by_name.get(text.casefold())) is not None:
        return exact
    return by_value.get(int(text)) if _is_number(text) else None


def _numbered(text: str, names: tuple[str, ...]) -> int | None:
    return int(text) if _is_number(text) and int(text) < len(names) else None


def _is_number(text: str) -> bool:
    return len(text) < 10 and DIGITS.fullmatch(text) is not None


def _number(label: int | str | None, model: ModelInfo) -> int | None:
    if label is None:
        return None
    if (number := find_class(label, model.class_names)) is None:
        raise InvalidField.of("class_label", class_bound(model.class_names), label)
    return number


@lru_cache(maxsize=4)  # a request may have a thousand labels, each looked up among a thousand names
def _numbers_by_name(names: tuple[str, ...]) -> tuple[Mapping[str, int], Mapping[int, int]]:
    """Return two mappings to class numbers: from names, and from the values of names that are numbers.

    A value shared by several names is left out.
    """
    values = {number: int(name) for number, name in enumerate(names) if _is_number(name)}
    times = Counter(values.values())
    by_value = {value: number for number, value in values.items() if times[value] == 1}
    return {name.casefold(): number for number, name in enumerate(names)}, by_value


def class_of_prompt(prompt: str, model: ModelInfo, field: str = "prompt") -> int | None:
    """Return the class that a prompt names, or None for an empty prompt. Raises InvalidField, which lists the classes.

    A prompt is a class's name or number. Case is ignored, and hyphens, spaces and underscores are equivalent, because
    people write both `t-shirt` and `T shirt`. A merely similar name never matches. field: the name of the prompt's
    field, for errors.
    """
    name, names = prompt.strip(), model.class_names
    if not name and (not model.conditional or model.null_class is not None):
        return None
    if not model.conditional:
        raise InvalidField.of(field, "empty: this model has no classes", prompt)
    number = find_class(name, names, field)
    if number is None:
        number = _numbers_by_spelling(names).get(_spelled(name))
    if number is None:
        none = "" if model.null_class is None else ', or "" for none'
        raise InvalidField.of(field, f"a class of this model, {known_classes(names)}{none}", prompt)
    return number


def _spelled(name: str) -> str:
    return BETWEEN_WORDS.sub(" ", name.strip().casefold())


@lru_cache(maxsize=4)  # there may be a thousand classes
def _numbers_by_spelling(names: tuple[str, ...]) -> Mapping[str, int]:
    """Return class numbers keyed by normalized name. Ambiguous names are left out."""
    times = Counter(map(_spelled, names))
    return {_spelled(name): number for number, name in enumerate(names) if times[_spelled(name)] == 1}
