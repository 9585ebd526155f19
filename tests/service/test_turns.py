import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tminus.service.turns import CallerTurns


class Machine:
    """Turns at a machine with a clock of its own: a turn takes the seconds that it says."""

    def __init__(self) -> None:
        self.now_s, self.goes = 0.0, asyncio.Event()
        self.goes.set()
        self.turns = CallerTurns(lambda: self.now_s)
        self.served: list[str] = []

    async def use(self, caller: str, seconds: float = 1.0) -> None:
        async with self.turns.taken(caller, seconds):
            self.served.append(caller)
            await self.goes.wait()
            await asyncio.sleep(0)
            self.now_s += seconds


def served(act: Callable[[Machine], Coroutine[Any, Any, None]]) -> str:
    machine = Machine()
    asyncio.run(act(machine))
    return "".join(machine.served)


def test_callers_take_turns_however_many_one_of_them_sends() -> None:
    async def crowd(machine: Machine) -> None:
        await asyncio.gather(*(machine.use(caller) for caller in "aaaaabb"))

    assert served(crowd) == "ababaaa"


def test_whoever_takes_long_waits_for_more_turns_of_others() -> None:
    async def crowd(machine: Machine) -> None:
        await asyncio.gather(*(machine.use(caller, 4.0 if caller == "a" else 1.0) for caller in "aabbbbbb"))

    assert served(crowd) == "abbbbabb"


def test_a_caller_that_asked_for_nothing_has_saved_no_time() -> None:
    async def late(machine: Machine) -> None:
        first = [asyncio.ensure_future(machine.use("a")) for _ in range(14)]
        await first[9]
        await asyncio.gather(*first, *(machine.use("b") for _ in range(4)))

    assert served(late) == 10 * "a" + "aabababb", "and a had one turn before b came"


def test_a_caller_does_not_get_more_by_leaving_after_each_turn() -> None:
    async def come_and_go(machine: Machine) -> None:
        crowd = [asyncio.ensure_future(machine.use("a")) for _ in range(6)]
        await asyncio.sleep(0)
        for _ in range(3):
            await machine.use("b", 2.0)
        await asyncio.gather(*crowd)

    order = served(come_and_go)
    assert order.index("b") == 1
    assert order[: order.rindex("b")].count("a") >= 4, "b had two seconds for each of a's"


def test_a_turn_that_is_cancelled_passes_to_the_next() -> None:
    async def leave(machine: Machine) -> None:
        gone = asyncio.Event()

        async def hold() -> None:
            async with machine.turns.taken("a"):
                gone.set()
                await asyncio.Event().wait()

        holding = asyncio.ensure_future(hold())
        await gone.wait()
        waiting = [asyncio.ensure_future(machine.use(caller)) for caller in "bcd"]
        await asyncio.sleep(0)
        waiting[1].cancel()
        holding.cancel()
        await asyncio.sleep(0)  # b's turn has come, and b is cancelled before it knows
        waiting[0].cancel()
        await asyncio.wait([holding, *waiting])

    assert served(leave) == "d"


def test_the_wait_is_predicted_by_the_turns_that_come_before() -> None:
    async def crowd(machine: Machine) -> None:
        turns = machine.turns
        assert turns.wait_s("a") == 0.0
        machine.goes.clear()
        waiting = [asyncio.ensure_future(machine.use("a", 2.0)) for _ in range(5)]
        await asyncio.sleep(0)
        assert turns.wait_s("a") == pytest.approx(10.0)
        assert turns.wait_s("b") == pytest.approx(2.0), "b waits for the one that goes on"
        waiting += [asyncio.ensure_future(machine.use("b", 1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert turns.wait_s("b") == pytest.approx(2.0 + 3.0 + 2.0)
        assert turns.wait_s("a") == pytest.approx(10.0 + 3.0)
        machine.goes.set()
        await asyncio.gather(*waiting)

    served(crowd)
