"""What trials of one server share: clients that take little of its cores, what it counts, and how a trial is run."""

import asyncio
import os
import sys
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

from bench import servers
from tests.trials.claims import Claim, report

PATIENCE_S = 300.0
ROW_STEPS, BACKLOG = "tminus_row_steps_total", "tminus_backlog_seconds"


class Answer(NamedTuple):
    """What one request got."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def wait_s(self) -> int:
        """The Retry-After of a refusal; 0 where there is none."""
        return int(self.headers.get("retry-after", 0))


async def connection(
    url: str, address: str | None = None, limit: int = 2**17
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a server. address: of ours, as a port is for one connection from one address."""
    host, port = url.removeprefix("http://").split(":")
    local = None if address is None else (address, 0)
    return await asyncio.open_connection(host, int(port), local_addr=local, limit=limit)


async def ask(
    url: str, method: str, target: str, body: bytes = b"", *, address: str | None = None, **headers: str
) -> Answer:
    """One request on a connection of its own. httpx would take more of the server's cores."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await connection(url, address)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            pairs = (line.partition(":") for line in rest if line)
            named = {name.lower(): value.strip() for name, _, value in pairs}
            return Answer(int(first.split()[1]), named, await reader.read())
        finally:
            writer.close()


async def metrics(url: str, **headers: str) -> dict[str, float]:
    """What a server counts, each the sum over its labels."""
    return servers.sum_metrics((await ask(url, "GET", "/metrics", **headers)).body.decode())


async def backlog_below(url: str, seconds: float) -> None:
    """Wait until no more than so much is left to do."""
    while (await metrics(url))[BACKLOG] > seconds:  # noqa: ASYNC110  it is another process's
        await asyncio.sleep(0.05)


async def saturated(
    url: str, clients: Sequence[Callable[[], Awaitable[None]]], seconds: float, warm_up_s: float, **headers: str
) -> float:
    """Row-steps a second while each client comes again as soon as it is done, counted after a warm-up."""

    async def keep_coming(client: Callable[[], Awaitable[None]]) -> None:
        while True:
            await client()

    tasks = [asyncio.create_task(keep_coming(client)) for client in clients]
    try:
        await asyncio.sleep(warm_up_s)
        before, began_s = await metrics(url, **headers), time.perf_counter()
        await asyncio.sleep(seconds)
        after, took_s = await metrics(url, **headers), time.perf_counter() - began_s
    finally:
        for task in tasks:
            task.cancel()
        failed = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if error]
    assert all(isinstance(error, asyncio.CancelledError) for error in failed), failed
    return (after[ROW_STEPS] - before[ROW_STEPS]) / took_s


def run_on_server(
    trial: Callable[..., Awaitable[list[Claim]]],
    flags: Sequence[str],
    options: Namespace,
    *,
    env: dict[str, str] | None = None,
) -> NoReturn:
    """Run a trial on a server of its own, print its claims and exit.

    options: the checkpoint, and what the trial is given. env: in place of the bench's variables.
    """
    tminus = servers.contenders(servers.cores(), flags)["tminus"]
    if env is not None:
        tminus = replace(tminus, env=env)
    given = vars(options)
    with servers.running(tminus, given.pop("checkpoint"), None) as server:
        os.nice(10)  # the clients are not the server's cost, and share its cores here only

        async def run() -> list[Claim]:
            return await trial(server.url, **given)

        sys.exit(report(asyncio.run(run())))
