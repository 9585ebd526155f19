"""Connections opened and dropped at random points: do rows, tasks, files and memory come back to where they were?

    .venv/bin/python -m tests.trials.churn [--connections 1000] [--at-once 25]

Clients of every kind (POST /sample, a stream, a durable job's events, an upload) that go away at a random moment, by
closing, by resetting the connection, or in the middle of what they send. A first round of as many warms up.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from typing import Any

from websockets.frames import Frame, Opcode

from bench import servers
from tests.trials import clients
from tests.trials.claims import Claim, most
from tests.trials.clients import ask, connection, metrics

LONGEST_S = 0.6  # that a client stays
SETTLE_S = 30.0
MEMORY = "resident memory, bytes"
KINDS = ("sample", "stream", "events", "upload", "half a request", "silence")
HANDSHAKE = (
    "GET /sample/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def trial(url: str, connections: int, at_once: int) -> list[Claim]:
    """Twice the same, the first time to warm up."""
    await churn(url, connections, at_once, random.Random(1))
    before = await settled(url)
    kinds = await churn(url, connections, at_once, random.Random(2))
    after = await settled(url)
    print(f"{connections} connections: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    return [
        most(name, after[name], was * (1.02 if name == MEMORY else 1.0), form=",.0f") for name, was in before.items()
    ]


async def churn(url: str, connections: int, at_once: int, rng: random.Random) -> Counter[str]:
    """So many clients, so many at a time; how many of each kind."""
    kinds: Counter[str] = Counter()
    turn = asyncio.Semaphore(at_once)

    async def one(kind: str, seed: int) -> None:
        async with turn:
            kinds[kind] += 1
            await client(url, kind, random.Random(seed))

    await asyncio.gather(*(one(rng.choice(KINDS), rng.getrandbits(32)) for _ in range(connections)))
    return kinds


async def client(url: str, kind: str, rng: random.Random) -> None:
    """Connect, ask, stay for a random time, reading or not, and go."""
    host = url.removeprefix("http://")
    reader, writer = await connection(url)
    until_s = time.perf_counter() + rng.uniform(0, LONGEST_S)
    spec = {"n": rng.randint(1, 4), "steps": rng.choice([20, 200, 1000]), "seed": rng.getrandbits(32)}
    try:
        async with asyncio.timeout(LONGEST_S):
            data = first_bytes(kind, spec, host, rng)
            if kind == "events":
                job = json.loads((await ask(url, "POST", "/jobs", json.dumps(spec | {"n": 1}).encode())).body)
                path = f"/jobs/{job.get('id', 'none')}"
                data = f"GET {path}/events?every=1&show=x_t HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
                writer.write(data)
                await asyncio.sleep(rng.uniform(0, LONGEST_S / 2))
                await ask(url, "DELETE", path)
            writer.write(data)
            if kind == "stream" and rng.random() < 0.9:
                await reader.readuntil(b"\r\n\r\n")
                text = json.dumps(spec | {"every": 1}).encode()
                writer.write(Frame(Opcode.TEXT, text).serialize(mask=True))
            while time.perf_counter() < until_s:
                if rng.random() < 0.5:
                    await asyncio.sleep(0.02)
                elif not await reader.read(4096):
                    break
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        if rng.random() < 0.5:  # a reset instead of a goodbye
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def first_bytes(kind: str, spec: dict[str, Any], host: str, rng: random.Random) -> bytes:
    """What a client of this kind sends first."""
    body = json.dumps(spec).encode()
    head = f"POST /sample HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    if kind == "sample":
        return head + body
    if kind == "stream":
        return HANDSHAKE.format(host=host).encode()
    if kind == "half a request":
        return (head + body)[: rng.randrange(len(head + body))]
    if kind == "upload":
        return f"POST /noise?t=5 HTTP/1.1\r\nHost: {host}\r\nContent-Length: 500000\r\n\r\n".encode() + bytes(100_000)
    return b""


async def settled(url: str) -> dict[str, float]:
    """What the server holds, once nothing of it but its memory changes any more."""
    deadline, last = time.monotonic() + SETTLE_S, dict[str, float]()
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        counted = await metrics(url)
        found = {
            "rows": counted["tminus_rows_active"] + counted["tminus_rows_waiting"],
            "tasks": counted["tminus_asyncio_tasks"],
            "open files": counted["process_open_fds"],
            MEMORY: counted["process_resident_memory_bytes"],
        }
        if not found["rows"] and found | {MEMORY: 0} == last | {MEMORY: 0}:
            return found
        last = found
    return last


if __name__ == "__main__":
    options = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, connections=1000, at_once=25)
    clients.run_on_server(trial, ("--max-streams-per-address", "4096"), options)
