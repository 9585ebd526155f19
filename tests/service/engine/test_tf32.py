"""The flags are those of who launches, and then what they were. They are there without a GPU too."""

import threading
from collections.abc import Iterator

import pytest
import torch

from tminus.service.engine.devices import multiplying

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def defaults() -> Iterator[tuple[bool, bool]]:
    before = flags()
    yield before
    assert flags() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_flags_are_set_inside_and_as_before_outside(defaults: tuple[bool, bool], tf32: bool) -> None:
    with multiplying(CUDA, tf32=tf32):
        assert flags() == (tf32, tf32)
        with multiplying(CUDA, tf32=tf32):
            assert flags() == (tf32, tf32)
        assert flags() == (tf32, tf32)
    assert flags() == defaults


def test_flags_are_as_before_after_an_error() -> None:
    with pytest.raises(RuntimeError), multiplying(CUDA, tf32=True):
        raise RuntimeError


def test_nothing_is_set_on_a_cpu(defaults: tuple[bool, bool]) -> None:
    with multiplying(CPU, tf32=not defaults[0]):
        assert flags() == defaults


def test_threads_that_want_the_same_do_not_wait_for_each_other() -> None:
    """One of them may be compiling, which takes a minute."""
    seen: list[tuple[bool, bool]] = []

    def other() -> None:
        with multiplying(CUDA, tf32=True):
            seen.append(flags())

    thread = threading.Thread(target=other)
    with multiplying(CUDA, tf32=True):
        thread.start()
        thread.join(10)
        assert seen == [(True, True)]
        assert flags() == (True, True), "the first still launches"


def test_another_thread_waits_for_its_turn() -> None:
    seen: list[tuple[bool, bool]] = []

    def other() -> None:
        with multiplying(CUDA, tf32=True):
            seen.append(flags())

    thread = threading.Thread(target=other)
    with multiplying(CUDA, tf32=False):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert flags() == (False, False)
    thread.join(10)
    assert seen == [(True, True)]
