import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.service.fakes import PATIENCE_S
from tminus.service.preview import Frame, Mailbox


def frame(step: int) -> Frame:
    return Frame(step, dict)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


def make_mailbox(dropped: list[None]) -> Mailbox:
    return Mailbox(asyncio.get_running_loop(), lambda: dropped.append(None))


def test_the_newest_frame_is_taken_and_those_it_replaced_are_counted() -> None:
    async def test() -> None:
        dropped: list[None] = []
        mailbox = make_mailbox(dropped)
        for step in range(5):
            mailbox.put(frame(step))
        taken = await mailbox.take()
        assert taken is not None
        assert taken.step == 4
        assert mailbox.dropped == len(dropped) == 4

    run(test())


def test_a_reader_waits_for_a_frame_from_another_thread() -> None:
    async def test() -> None:
        mailbox = make_mailbox([])
        for step in range(3):
            threading.Timer(0.0, mailbox.put, [frame(step)]).start()
            taken = await mailbox.take()
            assert taken is not None
            assert taken.step == step

    run(test())


def test_closing_ends_the_readers_wait_drops_what_is_left_and_takes_no_later_frame() -> None:
    async def test() -> None:
        dropped: list[None] = []
        waiting, full = make_mailbox(dropped), make_mailbox(dropped)
        reading = asyncio.ensure_future(waiting.take())
        await asyncio.sleep(0)
        full.put(frame(1))
        for mailbox in (waiting, full, full):
            mailbox.close()
        assert await reading is None
        for mailbox in (waiting, full):
            mailbox.put(frame(2))
            assert await mailbox.take() is None
        assert (waiting.dropped, full.dropped, len(dropped)) == (0, 1, 1)

    run(test())


def test_nothing_is_lost_or_doubled_between_a_fast_writer_and_a_reader() -> None:
    async def test() -> None:
        dropped: list[None] = []
        mailbox, last = make_mailbox(dropped), 20_000
        writer = threading.Thread(target=lambda: [mailbox.put(frame(step)) for step in range(1, last + 1)])
        writer.start()
        taken: list[int] = []
        while not taken or taken[-1] < last:
            got = await mailbox.take()
            assert got is not None
            taken.append(got.step)
        writer.join()
        assert taken == sorted(set(taken))
        assert len(taken) + len(dropped) == last

    run(test())


def test_a_closed_event_loop_is_no_error_for_the_worker() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop, pytest.fail)
    loop.close()
    mailbox.put(frame(1))
