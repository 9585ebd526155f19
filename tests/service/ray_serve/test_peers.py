"""The port of a replica's own: which it is. tests/e2e/test_ray.py asks there."""

from contextlib import closing

import pytest

from tests.postgres import free_port
from tminus.service.ray_serve.peers import listen


def test_the_first_free_port_is_taken_also_before_anything_is_answered() -> None:
    first = free_port()
    with closing(listen("127.0.0.1", [first])) as one:
        assert one.getsockname()[1] == first
        second = free_port()
        with closing(listen("127.0.0.1", [first, second])) as two:
            assert two.getsockname()[1] == second
            with pytest.raises(ValueError, match=r"--replica-ports .*: none of \d+\.\.\d+ is free on 127\.0\.0\.1"):
                listen("127.0.0.1", [first, second])


def test_any_port_is_taken_where_none_is_named() -> None:
    with closing(listen("127.0.0.1", (0,))) as one, closing(listen("127.0.0.1", (0,))) as two:
        assert one.getsockname()[1] != two.getsockname()[1]


def test_an_address_that_is_not_of_this_machine_is_told_of() -> None:
    with pytest.raises(OSError, match="assign"):
        listen("192.0.2.1", [8000, 8001])
