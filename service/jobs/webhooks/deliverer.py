"""Sends webhook deliveries, and retries with growing waits until each is delivered or given up.

Deliveries are kept in the store. A server claims a delivery for each attempt. If the server dies, the claim expires and
another server claims the delivery. A receiver thus gets each event at least once, always with the same id.

Receivers that do not answer do not delay other receivers. An owner may have as many attempts running as there are free
slots (dynamic thresholds, Choudhury & Hahne 1998). A single owner thus gets half of the slots, two owners get a third
each, and there is always room for another owner. Receivers whose last attempt failed share half of the slots by the
same rule. The other half is reserved for receivers that answer.
"""

import asyncio
import heapq
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx

from tminus.service.errors import InvalidField, ServiceError, StorageFailed
from tminus.service.jobs.jobs import JobView
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.webhooks.delivery_store import DELIVERY_S, Delivery, Room, Whose
from tminus.service.jobs.webhooks.sender import ATTEMPT_S, NamesBusy, NotDelivered, Sender
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.metrics import Metrics

log = logging.getLogger(__name__)

HELD_S = ATTEMPT_S + 5.0  # duration of a claim in seconds
POLL_INTERVAL_S = 5.0  # seconds between searches for deliveries left by other servers or by an earlier start
FIRST_WAIT_S, MOST_WAIT_S, GROWTH = 5.0, 3600.0, 4.0
JITTER = 0.25  # a wait varies by this fraction, up or down, so that simultaneous failures are not retried together
MOST_ATTEMPTS = 200
NOT_THERE_S = 5.0  # seconds to wait if the job cannot be read or too many names are being looked up

AT_ONCE, FAILING_AT_ONCE = 256, 128  # per model: concurrent attempts in total, and to receivers that failed last
BEGUN_AT_ONCE = 32  # attempts that start before the event loop runs other tasks
MOST_FAILING = 256  # number of failing receivers to remember


@dataclass(frozen=True, slots=True)
class Rules:
    """The sender, the allowed receivers, and the time limit of a delivery."""

    sender: Sender
    allowed: AllowedReceivers
    retry_s: float = DELIVERY_S

    @classmethod
    def of(cls, secrets: tuple[bytes, ...], allow: str) -> "Rules":
        """Create rules.

        Trust the certificates in SSL_CERT_FILE if it is set, otherwise those of certifi, as httpx does. Raises OSError
        if the certificates cannot be read, and ValueError if `allow` is malformed.
        """
        allowed = AllowedReceivers.parse(allow)
        return cls(Sender(secrets, allowed, httpx.create_ssl_context()), allowed)


def wait_s(attempts: int, draw: Callable[[], float] = random.random) -> float:
    """Return how many seconds to wait after this number of failed attempts."""
    longest = min(MOST_WAIT_S, FIRST_WAIT_S * GROWTH ** min(attempts - 1, 20))
    return longest * (1 - JITTER + 2 * JITTER * draw())


class Slots:
    """Owns the running attempts, and remembers the receivers whose last attempt failed."""

    def __init__(self) -> None:
        # Running attempts, keyed by delivery id. The bool is True if the receiver was known to fail.
        self._taken: dict[str, tuple[Delivery, bool]] = {}
        self._failing: dict[Whose, None] = {}  # newest last

    def room(self) -> Room | None:
        """Return the limits for new attempts, or None if all slots are taken."""
        free = AT_ONCE - len(self._taken)
        if free <= 0:
            return None
        owners = Counter(delivery.owner for delivery, _ in self._taken.values())
        owners_of_failing = Counter(delivery.owner for delivery, is_failing in self._taken.values() if is_failing)
        free_of_failing = FAILING_AT_ONCE - owners_of_failing.total()
        return Room(
            min(free, BEGUN_AT_ONCE),
            min(free, BEGUN_AT_ONCE, free_of_failing),
            busy=frozenset(delivery.whose for delivery, _ in self._taken.values()),
            failing=frozenset(self._failing),
            full=frozenset(owner for owner, count in owners.items() if count >= free),
            full_of_failing=frozenset(owner for owner, count in owners_of_failing.items() if count >= free_of_failing),
        )

    def take(self, delivery: Delivery) -> None:
        self._taken[delivery.id] = delivery, delivery.error is not None or delivery.whose in self._failing

    def give_back(self, delivery: Delivery) -> None:
        del self._taken[delivery.id]

    def sharer(self, delivery: Delivery) -> str:
        """Return the key that an attempt's name lookups count against.

        An owner's failing receivers have their own key.
        """
        _, is_failing = self._taken[delivery.id]
        return f"{delivery.owner}\x1ffailing" if is_failing else delivery.owner

    def answered(self, delivery: Delivery) -> None:
        self._failing.pop(delivery.whose, None)

    def failed(self, delivery: Delivery) -> None:
        """Record that the receiver does not answer, or answers with an error."""
        self.answered(delivery)
        self._failing[delivery.whose] = None
        if len(self._failing) > MOST_FAILING:
            del self._failing[next(iter(self._failing))]


class Deliverer:
    """Sends the deliveries of one store. Used only in the event loop's thread."""

    def __init__(
        self,
        store: AsyncStore,
        rules: Rules,
        view: Callable[[str], Awaitable[JobView]],
        document: Callable[[JobView], Mapping[str, Any]],
        metrics: Metrics,
    ) -> None:
        """view: makes the view of a job from its id; raises ServiceError. document: makes the request body."""
        self._store, self._rules, self._view, self._document = store, rules, view, document
        self._metrics = metrics
        self._slots = Slots()
        self._due_s: list[float] = []  # heap of the times of this server's next attempts, on the event loop's clock

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as attempts:  # if an attempt is cancelled, its claim expires
            while True:
                try:
                    self._store.owes.clear()
                    await self._look(attempts)
                except StorageFailed:  # the store logs its own failures
                    await asyncio.sleep(POLL_INTERVAL_S)
                    continue
                except Exception:
                    log.exception("webhooks could not be looked for")
                await self._wait()

    async def _look(self, attempts: asyncio.TaskGroup) -> None:
        """Start due attempts while there is room. When an attempt ends, it triggers another search."""
        now_s = asyncio.get_running_loop().time()
        while self._due_s and self._due_s[0] <= now_s:
            heapq.heappop(self._due_s)
        if (room := self._slots.room()) is None:
            return
        found = await self._store.call(JobStore.claim_deliveries, room, HELD_S)
        if len(found) == room.most:
            self._store.owes.set()
        for delivery in found:
            self._slots.take(delivery)
            attempts.create_task(self._attempt(delivery))

    async def _wait(self) -> None:
        """Wait until a delivery may be due: after a new event or an attempt's end, or when a retry is due."""
        until_due_s = self._due_s[0] - asyncio.get_running_loop().time() if self._due_s else POLL_INTERVAL_S
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(POLL_INTERVAL_S, until_due_s))):
                await self._store.owes.wait()

    async def _attempt(self, delivery: Delivery) -> None:
        try:
            ended, again_in_s, counts = await self._ended(delivery)
            if not await self._store.call(JobStore.settle, ended, again_in_s, counts=counts):
                log.warning("webhook %s of job %s is another's by now, or gone", delivery.id, delivery.job_id)
            elif ended.state != "pending":
                self._metrics.count("tminus_webhook_events_total", ended.state)
        except StorageFailed:  # the claim expires, and the event is sent again
            pass
        except Exception:
            log.exception("the end of webhook %s of job %s could not be kept", delivery.id, delivery.job_id)
        finally:
            self._slots.give_back(delivery)
            self._store.owes.set()

    async def _ended(self, delivery: Delivery) -> tuple[Delivery, float, bool]:
        """Attempt a delivery.

        Return its new state, the seconds until the next attempt, and whether this attempt counts.
        """
        began_s = time.perf_counter()
        try:
            view = await self._view(delivery.job_id)
            assert view.record.webhook is not None
            body = json.dumps(self._document(view)).encode()
            await self._rules.sender.send(view.record.webhook.url, delivery.id, body, self._slots.sharer(delivery))
        except NotDelivered as error:
            self._slots.failed(delivery)
            return self._failed(delivery, error.reason, time.perf_counter() - began_s, is_final=error.is_final)
        except InvalidField:  # the setting --webhook-allow has changed
            return self._failed(delivery, "this receiver is not allowed any more", 0.0)
        except StorageFailed as error:
            if not error.damaged:
                return self._failed(delivery, "the job could not be read", 0.0, counts=False)
            return self._failed(delivery, "the job cannot be read", 0.0, is_final=True)
        except NamesBusy:
            return self._failed(delivery, "many names of receivers are being looked up", 0.0, counts=False)
        except ServiceError as error:
            return self._failed(delivery, error.title, 0.0, is_final=True)
        except Exception:
            log.exception("webhook %s of job %s could not be sent", delivery.id, delivery.job_id)
            return self._failed(delivery, "something went wrong on the server; its log has the details", 0.0)
        took_s = time.perf_counter() - began_s
        self._metrics.observe("tminus_webhook_attempt_duration_seconds", took_s, "delivered")
        log.info(
            "webhook %s of job %s: delivered to %s in %.3f s, attempt %d",
            delivery.id, delivery.job_id, delivery.receiver, took_s, delivery.attempts,
        )  # fmt: skip
        self._slots.answered(delivery)
        return replace(delivery, state="delivered", error=None), 0.0, True

    def _failed(
        self, delivery: Delivery, reason: str, took_s: float, *, is_final: bool = False, counts: bool = True
    ) -> tuple[Delivery, float, bool]:
        """Return the result of `_ended` for a failure.

        counts: False if nothing was attempted. Then the receiver does not count as failing, and the next wait does not
        grow.
        """
        if counts:
            self._metrics.observe("tminus_webhook_attempt_duration_seconds", took_s, "failed")
        again_in_s, age_s = wait_s(delivery.attempts), (self._store.now_us() - delivery.since_us) / 1e6
        if not counts:
            again_in_s = NOT_THERE_S
        if is_final or delivery.attempts >= MOST_ATTEMPTS or age_s + again_in_s > self._rules.retry_s:
            log.warning(
                "webhook %s of job %s: given up after %d attempts to reach %s: %s",
                delivery.id, delivery.job_id, delivery.attempts, delivery.receiver, reason,
            )  # fmt: skip
            return replace(delivery, state="given_up", error=reason), 0.0, counts
        log.info(
            "webhook %s of job %s: attempt %d to reach %s failed, the next in %.0f s: %s",
            delivery.id, delivery.job_id, delivery.attempts, delivery.receiver, again_in_s, reason,
        )  # fmt: skip
        heapq.heappush(self._due_s, asyncio.get_running_loop().time() + again_in_s)
        return replace(delivery, error=reason if counts else delivery.error), again_in_s, counts
