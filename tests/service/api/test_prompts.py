"""Which class a prompt names."""

from dataclasses import replace

import pytest

from tests.service.fakes import INFO
from tminus.service.api.request.classes import class_of_prompt
from tminus.service.errors import InvalidField

FASHION = replace(INFO, class_names=("t-shirt", "trouser", "ankle-boot"), null_class=3)
PLAIN = replace(INFO, conditional=False, class_names=(), null_class=None)


@pytest.mark.parametrize("prompt", ["t-shirt", "T-Shirt", "t shirt", "T_SHIRT", " t  shirt ", "0"])
def test_a_class_is_found_however_it_is_spelled(prompt: str) -> None:
    assert class_of_prompt(prompt, FASHION) == 0


@pytest.mark.parametrize("prompt", ["", " ", "\n"])
def test_an_empty_prompt_is_no_class(prompt: str) -> None:
    assert class_of_prompt(prompt, FASHION) is None
    assert class_of_prompt(prompt, PLAIN) is None


@pytest.mark.parametrize(
    "prompt",
    ["tshirt", "boot", "a t-shirt", "t-shirts", "3", "-", "-1", "+1", "1.0", "²", "1e0", "9" * 5000, "x" * 5000],
)
def test_nothing_is_guessed(prompt: str) -> None:
    with pytest.raises(InvalidField) as caught:
        class_of_prompt(prompt, FASHION)
    assert caught.value.field == "prompt"
    assert 'a class of this model, 0..2 or t-shirt, trouser, ankle-boot, or "" for none' in caught.value.detail
    assert len(caught.value.detail) < 400


def test_the_field_of_the_prompt_is_named() -> None:
    with pytest.raises(InvalidField) as caught:
        class_of_prompt("boot", FASHION, "inputs")
    assert caught.value.field == "inputs"


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
