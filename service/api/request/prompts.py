"""Prompts of clients that are made for models of text. Here a prompt is the name of a class, or empty. Pure."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from tminus.service.api.request.classes import find_class, known_classes
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo

BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")


def class_of_prompt(prompt: str, model: ModelInfo, field: str = "prompt") -> int | None:
    """Find the class that a prompt names, None for an empty prompt. Raises InvalidField, with the classes there are.

    A class is named by its name or number. Case does not matter, and hyphens, spaces and underscores are alike: people
    write `t-shirt` and `T shirt`. That is spelling: a class that is only similar is never taken. field: of the prompt.
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


@lru_cache(maxsize=4)  # a model may have a thousand classes
def _numbers_by_spelling(names: tuple[str, ...]) -> Mapping[str, int]:
    """Each class by its spelling, where no other class is spelled alike."""
    times = Counter(map(_spelled, names))
    return {_spelled(name): number for number, name in enumerate(names) if times[_spelled(name)] == 1}
