"""The models of a server, as it tells of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from . import checks
from .errors import UnexpectedAnswer
from .results import OK, object_of

Loaded = Literal["loaded", "loading", "unloading", "unloaded"]
STATES: dict[str, Loaded] = {
    "loaded": "loaded",
    "loading": "loading",
    "unloading": "unloading",
    "unloaded": "unloaded",
}


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as GET /models describes it. `info` is what GET /model says of it, and None where it is not loaded."""

    name: str
    default: bool  # whether calls that name no model are of it
    state: Loaded
    info: Mapping[str, Any] | None

    @classmethod
    def of(cls, document: Any) -> "ModelState":
        """Read a model's document; members that a newer server adds are ignored. Raises UnexpectedAnswer."""
        try:
            members = checks.mapping(document)
            model = cls(
                name=checks.model_name(members["name"]),
                default=checks.yes_or_no(members["default"]),
                state=STATES[checks.text(members["state"])],
                info=checks.optional(checks.mapping, members["model"]),
            )
            if (model.state == "loaded") != (model.info is not None):
                raise ValueError(f"{model.name} is {model.state}, with {'no ' * (model.info is None)}description")
        except (KeyError, ValueError) as error:
            raise UnexpectedAnswer(OK, error) from None
        return model


def models_of(response: httpx.Response) -> list[ModelState]:
    """The models in a list, each of another name. Raises UnexpectedAnswer."""
    document = object_of(response)
    try:
        models = [ModelState.of(model) for model in checks.items(document["models"])]
        if len({model.name for model in models}) < len(models):
            raise ValueError("a name comes twice")
    except (KeyError, ValueError) as error:
        raise UnexpectedAnswer(response.status_code, error) from None
    return models
