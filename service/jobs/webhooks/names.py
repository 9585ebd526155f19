"""Names to addresses, for webhooks. A name server that does not answer holds nobody but who waits for that name."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

LookUp = Callable[[str, str], Awaitable[list[str]]]  # of a name, for a sharer
MOST_LOOKUPS = 128  # threads that wait for name servers


class NamesBusy(Exception):
    """So many names are being looked up for this sharer that this one has to wait."""


class Names:
    """Looks names up in threads of its own. In the event loop's thread only.

    Not by the loop's own getaddrinfo: that shares its threads with all that the server does beside the loop, and these
    wait at the end of the process too.
    """

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Future[list[str]]] = {}  # names that are being looked up, once each
        self._sharers: dict[str, str | None] = {}  # whose share each of them takes; None: nobody's any more

    async def look_up(self, name: str, sharer: str = "") -> list[str]:
        """The addresses of a name, as the system finds them. Raises OSError and NamesBusy.

        A sharer may have as many threads as are free, see Slots. One that is given up goes on, and is nobody's: the
        next names of its sharer have half of what is left then.
        """
        if name not in self._asked:
            if [*self._sharers.values()].count(sharer) >= MOST_LOOKUPS - len(self._asked):
                raise NamesBusy
            self._begin(name, sharer)
        try:
            return await asyncio.shield(self._asked[name])
        except asyncio.CancelledError:
            if name in self._asked:
                self._sharers[name] = None
            raise

    def _begin(self, name: str, sharer: str) -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()
        self._asked[name] = answer
        self._sharers[name] = sharer

        def end(addresses: list[str], error: OSError | None) -> None:
            del self._asked[name], self._sharers[name]
            if error is None:
                answer.set_result(addresses)
            else:
                answer.set_exception(error)
                answer.exception()  # nobody may be left who waits

        def run() -> None:
            addresses: list[str] = []
            failure: OSError | None = None
            try:
                found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
            except OSError as error:
                failure = error
            except UnicodeError:  # the codec for names of other languages
                failure = OSError("it is no name")
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end, addresses, failure)

        try:
            threading.Thread(target=run, name="tminus-webhook-name", daemon=True).start()
        except RuntimeError:  # the system has no thread left
            end([], OSError("no thread can be started"))
            raise NamesBusy from None
