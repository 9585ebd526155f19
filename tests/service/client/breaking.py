"""A transport that loses answers on purpose."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx


class Breaking(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """httpx's transport, whose answers break off. cuts: 0 loses an answer, k ends it after k pieces, None keeps it."""

    def __init__(self, *cuts: int | None) -> None:
        self.cuts, self.requests = list(cuts), list[httpx.Request]()
        self.sync, self.asynchronous = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self.sync.handle_request(request)
        cut = self.cuts.pop(0) if self.cuts else None
        if cut == 0:
            response.read()
            response.close()
            raise httpx.ReadError("cut", request=request)
        return broken_off(response, cut)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = await self.asynchronous.handle_async_request(request)
        cut = self.cuts.pop(0) if self.cuts else None
        if cut == 0:
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("cut", request=request)
        return broken_off(response, cut)

    def close(self) -> None:
        self.sync.close()

    async def aclose(self) -> None:
        await self.asynchronous.aclose()


def broken_off(response: httpx.Response, pieces: int | None) -> httpx.Response:
    if pieces is None:
        return response
    stream = BrokenOff(response.stream, pieces)
    return httpx.Response(response.status_code, headers=response.headers, stream=stream)


class BrokenOff(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off after some pieces."""

    def __init__(self, body: Any, pieces: int) -> None:
        self.body, self.pieces = body, pieces

    def __iter__(self) -> Iterator[bytes]:
        for _, piece in zip(range(self.pieces), self.body, strict=False):
            yield piece
        raise httpx.ReadError("cut")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.pieces
        async for piece in self.body:
            yield piece
            left -= 1
            if left == 0:
                raise httpx.ReadError("cut")

    def close(self) -> None:
        self.body.close()

    async def aclose(self) -> None:
        await self.body.aclose()
