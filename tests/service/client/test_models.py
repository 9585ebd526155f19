from typing import Any

import httpx
import pytest

from tminus.service.client import ModelState, UnexpectedAnswer, checks
from tminus.service.client.models import models_of
from tminus.service.startup import library


def members(**given: Any) -> dict[str, Any]:
    return {"name": "x", "default": False, "state": "loaded", "url": "/models/x/", "model": {"channels": 1}} | given


def test_a_model_is_read_and_what_a_newer_server_adds_is_ignored() -> None:
    assert ModelState.of(members(size=5)) == ModelState("x", False, "loaded", {"channels": 1})
    for state in ("loading", "unloading", "unloaded"):
        assert ModelState.of(members(state=state, url=None, model=None)).info is None


@pytest.mark.parametrize(
    "given",
    [
        {"name": None},
        {"name": ""},
        {"name": "../x"},
        {"name": "\x1b[2J"},
        {"name": "x" * 65},
        {"default": 1},
        {"state": "asleep"},
        {"state": ["loaded"]},
        {"state": "loaded", "model": None},
        {"state": "unloaded"},
        {"model": []},
        {"model": "x"},
    ],
    ids=str,
)
def test_a_model_whose_members_have_other_types_is_unexpected(given: dict[str, Any]) -> None:
    with pytest.raises(UnexpectedAnswer):
        ModelState.of(members(**given))


@pytest.mark.parametrize("missing", ["name", "default", "state", "model"])
def test_a_model_without_one_of_its_members_is_unexpected(missing: str) -> None:
    document = members()
    del document[missing]
    with pytest.raises(UnexpectedAnswer, match=f"no '{missing}'"):
        ModelState.of(document)


@pytest.mark.parametrize(
    "document", [[], {}, {"models": None}, {"models": {}}, {"models": [5]}, {"models": [members(), members()]}], ids=str
)
def test_a_list_that_cannot_be_read_is_unexpected(document: object) -> None:
    with pytest.raises(UnexpectedAnswer):
        models_of(httpx.Response(200, json=document))


def test_names_are_those_that_the_server_gives() -> None:
    assert checks.MODEL_NAME == library.NAME
