"""Notes that a job has begun, for its webhook: a viewer that sees no pictures and leaves after the first step."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

from tminus.service.errors import StorageFailed
from tminus.service.jobs.live import Live
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.preview import Frame, Pace, Watch
from tminus.service.worker.worker import Worker

Spawn = Callable[[Coroutine[None, None, None]], object]


def notice_start(live: Live, worker: Worker, store: AsyncStore, spawn: Spawn) -> None:
    """Owe it to a job's webhook that the job has begun, once it has, if that is wanted."""
    webhook = live.record.webhook
    if webhook is None or "start" not in webhook.events:
        return
    notice = StartNotice(lambda: spawn(_begun(live, worker, store, notice.watch)))
    live.viewers.append((notice.watch, notice))
    if live.submitted:
        worker.watch(live.record.id, notice.watch)


async def _begun(live: Live, worker: Worker, store: AsyncStore, watch: Watch) -> None:
    worker.unwatch(live.record.id, watch)
    with suppress(StorageFailed):  # then it is owed when the job is done
        await store.started(live.record)


class StartNotice:
    """Calls once, in the event loop, when a job has taken its first step. Stands among the job's viewers."""

    def __init__(self, on_start: Callable[[], object]) -> None:
        self.watch = Watch(Pace(every=1), (), self._put)
        self._loop, self._on_start = asyncio.get_running_loop(), on_start
        self._is_over = False  # changed in the event loop only

    def close(self) -> None:
        """See Viewer: the job has ended, or is another server's, and then it has not begun here."""
        self._is_over = True

    def _put(self, _frame: Frame) -> None:
        """In the worker's thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_start()
