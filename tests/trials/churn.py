"""Connections opened and dropped at random points: do rows, tasks, files and memory come back to where they were?

    .venv/bin/python -m tests.trials.churn [--connections 1000] [--at-once 25]

Clients of every kind (POST /sample, a stream, a durable job's events, an upload) that go away at a random moment, by
closing, by resetting the connection, or in the middle of what they send. A first round of as many warms up.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from bench import servers

LONGEST_S = 0.6  # that a client stays
SETTLE_S = 30.0
KINDS = ("sample", "stream", "events", "upload", "half a request", "silence")
HANDSHAKE = (
    "GET /sample/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def main() -> None:
    """Measure and print; exit with 1 where something did not come back."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=25)
    args = parser.parse_args()
    tminus = servers.contenders(1, ("--max-streams-per-address", "4096"))["tminus"]
    with servers.running(tminus, args.checkpoint, None) as server:
        sys.exit(asyncio.run(measure(server.url, args.connections, args.at_once)))


async def measure(url: str, connections: int, at_once: int) -> int:
    """Twice the same, the first time to warm up; the exit code."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await churn(url, connections, at_once, random.Random(1))
        before = await settled(http)
        kinds = await churn(url, connections, at_once, random.Random(2))
        after = await settled(http)
    print(f"{connections} connections: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    print("| what | before | after |\n|---|---|---|")
    for name, was in before.items():
        print(f"| {name} | {was:,.0f} | {after[name]:,.0f} |")
    back = all(after[name] <= was for name, was in before.items() if "memory" not in name)
    memory = after["resident memory, bytes"] / before["resident memory, bytes"]
    print(f"| resident memory, after / before | | **{memory:.3f}** |")
    return int(not back or memory > 1.02)


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
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    until_s = time.perf_counter() + rng.uniform(0, LONGEST_S)
    spec = {"n": rng.randint(1, 4), "steps": rng.choice([20, 200, 1000]), "seed": rng.getrandbits(32)}
    try:
        async with asyncio.timeout(LONGEST_S):
            data = first_bytes(kind, spec, f"{host}:{port}", rng)
            if kind == "events":
                async with httpx.AsyncClient(base_url=url) as http:
                    job_id = (await http.post("/jobs", json=spec | {"n": 1})).json().get("id", "none")
                    data = f"GET /jobs/{job_id}/events?every=1&show=x_t HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
                    writer.write(data)
                    await asyncio.sleep(rng.uniform(0, LONGEST_S / 2))
                    await http.delete(f"/jobs/{job_id}")
            writer.write(data)
            if kind == "stream" and rng.random() < 0.9:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(frame(json.dumps(spec | {"every": 1}).encode()))
            while time.perf_counter() < until_s:
                if rng.random() < 0.5:
                    await asyncio.sleep(0.02)
                elif not await reader.read(4096):
                    break
    except (TimeoutError, OSError, asyncio.IncompleteReadError, httpx.HTTPError):
        pass
    finally:
        if rng.random() < 0.5:  # a reset instead of a goodbye
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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


def frame(text: bytes) -> bytes:
    """One masked text frame (RFC 6455, section 5.2), by a mask of zeros."""
    assert len(text) < 65536
    return bytes([0x81, 0xFE]) + struct.pack(">H", len(text)) + bytes(4) + text


async def settled(http: httpx.AsyncClient) -> dict[str, float]:
    """What the server holds, once nothing of it changes any more."""
    deadline, last = time.monotonic() + SETTLE_S, dict[str, float]()
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        sums = servers.sum_metrics((await http.get("/metrics", headers={"Accept": "*/*"})).text)
        found = {
            "rows": sums["tminus_rows_active"] + sums["tminus_rows_waiting"],
            "tasks": sums["tminus_tasks"],
            "open files": sums["process_open_fds"],
            "resident memory, bytes": sums["process_resident_memory_bytes"],
        }
        if not found["rows"] and {**found, "resident memory, bytes": 0} == {**last, "resident memory, bytes": 0}:
            return found
        last = found
    return last


if __name__ == "__main__":
    main()
