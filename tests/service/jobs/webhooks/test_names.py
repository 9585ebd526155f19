"""Names in threads of their own: one that no server answers for holds nobody else."""

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from tests.service.fakes import PATIENCE_S
from tminus.service.jobs.webhooks import names as module
from tminus.service.jobs.webhooks.names import Names


def test_a_name_of_this_machine_and_an_address_are_found() -> None:
    assert "127.0.0.1" in asyncio.run(Names().look_up("localhost"))
    assert asyncio.run(Names().look_up("127.0.0.1")) == ["127.0.0.1"]
    assert asyncio.run(Names().look_up("::1")) == ["::1"]


@pytest.mark.parametrize("name", ["no-such-name.invalid", "a" * 64 + ".example", "\udcff"])
def test_a_name_that_is_none_is_an_os_error(name: str) -> None:
    with pytest.raises(OSError, match=r".+"):
        asyncio.run(Names().look_up(name))


def test_a_name_that_hangs_takes_one_thread_and_others_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, asked = threading.Event(), list[str]()
    look_up = socket.getaddrinfo

    def slow(name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        if name.startswith("slow"):
            assert hangs.wait(PATIENCE_S)
            name = "127.0.0.1"
        return look_up(name, *args, **kwargs)

    monkeypatch.setattr(module.socket, "getaddrinfo", slow)
    monkeypatch.setattr(module, "MOST_LOOKUPS", 4)

    async def run() -> None:
        names = Names()
        waiting = [asyncio.create_task(names.look_up("slow.example")) for _ in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            while "slow.example" not in asked:  # noqa: ASYNC110  a thread says it
                await asyncio.sleep(0)
            assert await names.look_up("127.0.0.2") == ["127.0.0.2"]
            other = asyncio.create_task(names.look_up("slow2.example"))
            while "slow2.example" not in asked:  # noqa: ASYNC110
                await asyncio.sleep(0)
            with pytest.raises(module.NamesBusy):
                await names.look_up("127.0.0.3")
            assert await names.look_up("127.0.0.3", "another owner") == ["127.0.0.3"]
            waiting[0].cancel()
            with suppress(asyncio.CancelledError):
                await waiting[0]
            assert await names.look_up("127.0.0.3") == ["127.0.0.3"], "what is given up is nobody's share"
            hangs.set()
            assert await asyncio.gather(*waiting[1:], other) == [["127.0.0.1"]] * 5
            assert await names.look_up("127.0.0.3") == ["127.0.0.3"]

    asyncio.run(run())
    assert asked.count("slow.example") == 1
