"""Which class a label names, where the names of classes are numbers too, and that every way to ask reads it alike."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.service.conftest import MakeSite, Site
from tests.service.fakes import INFO, wait_until
from tminus.service.api.request.classes import class_of_prompt, find_class
from tminus.service.errors import InvalidField

NUMBERED = replace(INFO, class_names=("1", "2", "3"))  # folders that are named 1, 2 and 3
SPEC = {"steps": 2, "seed": 7}
EITHER = "name:1 (class number 0) or number:1 (the class named 2): where names are numbers, 1 may be either"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("1", "2", "3"), {0: 0, "0": 0, 3: 2, "3": 2, "name:1": 0, "NUMBER:1": 1, "number:3": None, "name:0": None}),
        (("0", "1", "2"), {0: 0, "1": 1, 2: 2, "name:2": 2, "number:2": 2, 3: None}),
        (("01", "02", "03"), {0: 0, 3: 2, "03": 2, "name:01": 0, "name:1": 0, "number:1": 1}),
        (("cat", "dog", "10"), {1: 1, "10": 2, 10: 2, "2": 2, "name:dog": 1, "name:cow": None}),
        (("cat", "number:0"), {"number:0": 0, "name:number:0": 1, "number:1": 1, 0: 0}),
        (("7", "07"), {"7": 0, "07": 1, 7: 0, "007": None}),
        (("1.5", "-1"), {"1.5": 0, "-1": 1, -1: 1, 1: 1}),
    ],
)
def test_a_label_with_one_reading_is_that_class(names: tuple[str, ...], labels: dict[int | str, int | None]) -> None:
    assert {label: find_class(label, names) for label in labels} == labels


@pytest.mark.parametrize(
    ("names", "label"), [(("1", "2", "3"), 1), (("1", "2", "3"), "2"), (("01", "02"), "1"), (("01", "02"), "01")]
)
def test_a_number_with_two_readings_is_refused_with_both(names: tuple[str, ...], label: int | str) -> None:
    with pytest.raises(
        InvalidField, match=r"must be name:\w+ \(class number .\) or number:. \(the class named"
    ) as caught:
        find_class(label, names, "inputs")
    assert (caught.value.field, caught.value.value) == ("inputs", label)
    name, _, number = (caught.value.bound or "").partition(" or ")
    readings = {find_class(reading.split(" ")[0], names) for reading in (name, number)}
    assert len(readings) == 2, "each that is proposed has one reading"


def by_openai(site: Site, label: int | str) -> Any:
    return site.client.post("/v1/images/generations", json={"prompt": str(label)})


def by_hugging_face(site: Site, label: int | str) -> Any:
    return site.client.post("/", json={"inputs": str(label), "parameters": SPEC})


def by_kserve(site: Site, label: int | str) -> Any:
    datatype = "INT64" if isinstance(label, int) else "BYTES"
    tensor = {"name": "class_label", "shape": [1], "datatype": datatype, "data": [label]}
    return site.client.post("/v2/models/fake/infer", json={"inputs": [tensor], "parameters": {}})


def by_stream(site: Site, label: int | str) -> Any:
    with site.client.websocket_connect("/sample/stream") as stream:
        stream.send_text(json.dumps(SPEC | {"class_label": label}))
        while (message := stream.receive()).get("text") is None or json.loads(message["text"])["type"] not in (
            "done",
            "error",
        ):
            pass
    return message["text"]


WAYS: dict[str, Callable[[Site, int | str], Any]] = {
    "query": lambda site, label: site.client.get("/sample", params=SPEC | {"class_label": label}),
    "JSON": lambda site, label: site.post(json=SPEC | {"class_label": label}),
    "a list in JSON": lambda site, label: site.post(json=SPEC | {"class_label": [label]}),
    "form": lambda site, label: site.post(files={"class_label": (None, str(label)), "steps": (None, "2")}),
    "a durable job": lambda site, label: site.client.post("/jobs", json=SPEC | {"class_label": label}),
    "WebSocket": by_stream,
    "OpenAI": by_openai,
    "Hugging Face": by_hugging_face,
    "KServe": by_kserve,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_reads_a_label_alike(make_site: MakeSite, way: str) -> None:
    site, added = make_site(info=NUMBERED), list[Any]()
    site.engine.on_add = lambda spec: added.append(spec.class_labels)
    for label in (1, "1"):
        answer = WAYS[way](site, label)
        assert EITHER in (answer if isinstance(answer, str) else answer.text)
    assert added == []
    for label in (3, "number:2", "name:3"):
        WAYS[way](site, label)
    wait_until(lambda: len(added) == 3)  # a durable job is answered before it runs
    assert added == [(2,)] * 3


# --- prompts ---


FASHION = replace(INFO, class_names=("t-shirt", "trouser", "ankle-boot"), null_class=3)
PLAIN = replace(INFO, conditional=False, class_names=(), null_class=None)


def test_a_class_is_found_however_it_is_spelled_and_nothing_is_guessed() -> None:
    for prompt in ("t-shirt", "T_SHIRT", " t  shirt ", "0"):
        assert class_of_prompt(prompt, FASHION) == 0
    assert class_of_prompt("", FASHION) is class_of_prompt(" \n", PLAIN) is None
    for prompt in ("tshirt", "boot", "a t-shirt", "3", "-1", "1.0", "²", "9" * 5000):
        with pytest.raises(InvalidField) as caught:
            class_of_prompt(prompt, FASHION)
        assert caught.value.field == "prompt"
        assert 'a class of this model, 0..2 or t-shirt, trouser, ankle-boot, or "" for none' in caught.value.detail
        assert len(caught.value.detail) < 400


def test_an_exact_name_goes_before_one_that_is_spelled_alike() -> None:
    odd = replace(FASHION, class_names=("1", "0", "a-b", "a b"))
    assert [class_of_prompt(name, odd) for name in ("name:1", "name:0", "a-b", "a b")] == [0, 1, 2, 3]
    for unclear in ("a_b", "-1", "_0", "1"):
        with pytest.raises(InvalidField):
            class_of_prompt(unclear, odd)


def test_without_a_null_class_a_prompt_is_needed_and_without_classes_it_is_empty() -> None:
    with pytest.raises(InvalidField) as caught:
        class_of_prompt("", replace(FASHION, null_class=None))
    assert "for none" not in caught.value.detail
    with pytest.raises(InvalidField, match="no classes"):
        class_of_prompt("0", PLAIN)
