"""Clients that hold connections and do little with them: do others get their answers, and how much later?

    .venv/bin/python -m tests.trials.connections [--sockets 10000] [--only holding|readers|floods]

One after the other on one server, each for some seconds, while somebody else asks POST /sample again and again:

- slow heads and slow bodies, a byte at a time;
- heads that are too large, as fast as they are refused;
- 10,000 idle sockets: connections that say nothing, each opened anew when the server has closed it;
- 10,000 connections from one address that may have 1,024;
- idle WebSockets: handshakes without a spec, each opened anew likewise;
- handshakes that h11 reads and the WebSocket library does not, from one address;
- at once 300 slow readers of a large answer that is kept, but for the id of each request (KServe), 300 of one that is
  made for each (a trajectory), and 300 of one that is read from the store for each (a job's images as JSON): how much
  memory does the server take for them?

Then 16 clients send what costs the server most for its bytes, as fast as it takes it: tiny chunks, empty fragments,
pings, messages that mean nothing. Somebody asks GET /healthz meanwhile, with and without a long job in the engine. What
that takes is compared with what it takes beside 16 clients who ask GET /healthz as fast as they are answered.

The clients come from many addresses of the loopback network, as a port is for one connection from one address.
"""

import asyncio
import json
import random
import re
import resource
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from functools import partial

from bench import servers
from bench.client import meanwhile
from tests.trials import clients
from tests.trials.churn import HANDSHAKE
from tests.trials.claims import Claim, least, most, none
from tests.trials.clients import ask, connection, metrics
from tminus.service.api.edge.http_protocol import HEAD_S
from tminus.service.byte_budget import MAX_HELD_BYTES

SECONDS = 20.0
PER_ADDRESS = 500
SLOW, OVERSIZED = 200, 10  # clients of these kinds
BYTE_S = 0.5  # from one byte to the next
READERS, READ_BYTES = 300, 16_384  # and what each reads in a second: twice the least that a client must
KEPT_N, MADE_N = 768, 64  # images in an answer, of 32x32 pixels 3 MB and 1.5 MB
READERS_S = 6  # times the others' seconds, as their answers have to be made
READERS_BYTES = (
    MAX_HELD_BYTES + 3 * READERS * 2**18
)  # that the server may take for them: what it counts, and their buffers
PACE_S = 0.05  # from an answer to the plain client's next request
FACTOR, MARGIN_S = 2.0, 0.05  # what a plain request may take, over what it took before
SPEC = "n=1&steps=10"
ONE_ADDRESS = "127.0.200.1"
FILES = 256  # beside the connections
HEADS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: x\r\n" % number for number in range(20_000)) + b"\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
)
FLOODS, FLOOD_FACTOR = 16, 3.0  # clients at once; times as long as beside the plain ones
FRAME = bytes([0x80]) + bytes(4)  # the rest of an empty frame of a client
UPGRADE = HANDSHAKE.format(host="localhost").encode()
PLAIN = "plain requests"
FLOOD = {  # what each client sends at first, and again and again
    PLAIN: (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "tiny chunks": (b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "empty fragments": (UPGRADE + bytes([0x01]) + FRAME, bytes([0x00]) + FRAME),
    "pings": (UPGRADE, bytes([0x89]) + FRAME),
    "messages without a meaning": (UPGRADE, bytes([0x81, 0x80 | 17]) + bytes(4) + b'{"type":"cancel"}'),
}
Holder = Callable[[str, int, Counter[str]], Awaitable[None]]


def source(number: int) -> str:
    """An address of the loopback network, of PER_ADDRESS connections each."""
    return f"127.0.{1 + number // PER_ADDRESS}.1"


# --- clients who hold a connection; each goes on until it is cancelled ---


async def _slow(url: str, number: int, seen: Counter[str], *, first: bytes, data: bytes) -> None:
    """Send `data` a byte at a time, until the server answers or closes."""
    reader, writer = await connection(url, source(number))
    try:
        writer.write(first)
        answer = asyncio.create_task(reader.read(1000))
        for byte in data:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait({answer}, timeout=BYTE_S)
            if done:
                break
        note(await answer, seen)
    finally:
        writer.transport.abort()


slow_head = partial(_slow, first=b"", data=b"GET /model HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"x" * 1000)
slow_body = partial(
    _slow, first=b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n", data=b" " * 5000
)


async def oversized(url: str, number: int, seen: Counter[str]) -> None:
    reader, writer = await connection(url, source(number))
    try:
        writer.write(HEADS[number % len(HEADS)])
        note(await reader.read(1000), seen)
    finally:
        writer.transport.abort()


async def _idle(url: str, number: int, seen: Counter[str], *, first: bytes, address: str | None = None) -> None:
    """Say no more, and wait for the end."""
    reader, writer = await connection(url, address or source(number))
    try:
        writer.write(first)
        seen["open"] += 1
        seen["most open"] = max(seen["most open"], seen["open"])
        data = await reader.read(1000)
        note(data, seen)
        await reader.read()
        if b" 503 " in data:  # who is refused comes again as often as who is let in
            await asyncio.sleep(HEAD_S)
    finally:
        seen["open"] -= 1
        writer.transport.abort()


idle = partial(_idle, first=b"")
idle_of_one = partial(_idle, first=b"", address=ONE_ADDRESS)
idle_stream = partial(_idle, first=UPGRADE)
unanswerable = partial(_idle, first=UPGRADE.replace(b"\r\n\r\n", b"\r\nX-A: \x1b\r\n\r\n"), address=ONE_ADDRESS)


def slow_reader(request: bytes) -> Holder:
    async def read(url: str, number: int, seen: Counter[str]) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)  # or the kernel takes most of an answer
        sock.bind((source(number), 0))
        sock.setblocking(False)
        host, port = url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock, limit=READ_BYTES)
        try:
            writer.write(request)
            data = await reader.read(READ_BYTES)
            note(data, seen)
            while data:  # also of a refusal, so that who is refused comes again after a second
                await asyncio.sleep(1)
                data = await reader.read(READ_BYTES)
        finally:
            writer.transport.abort()

    return read


def note(data: bytes, seen: Counter[str]) -> None:
    found = re.match(rb"HTTP/1.1 (\d+)", data)
    seen[found[1].decode() if found else "closed"] += 1


# --- the trial ---


async def plain(url: str, method: str = "POST", target: str = "") -> float:
    """One request as anybody sends it: seconds. Raises if it fails."""
    began_s = time.perf_counter()
    answer = await ask(url, method, target or f"/sample?{SPEC}&seed={random.getrandbits(32)}", address="127.0.0.1")
    if answer.status != 200:
        raise ConnectionError(f"{answer.status} {answer.body[:200]!r}")
    return time.perf_counter() - began_s


def held(hold: Holder, url: str, count: int, seen: Counter[str]) -> AbstractAsyncContextManager[None]:
    """Run so many clients, each of whom comes again when its connection has ended; they come over two seconds."""

    async def again(number: int) -> None:
        await asyncio.sleep(random.Random(number).uniform(0, 2))
        while True:
            try:
                await hold(url, number, seen)
            except OSError as error:
                seen[type(error).__name__] += 1
                await asyncio.sleep(1)

    return meanwhile(*map(again, range(count)))


async def waits(url: str, seconds: float) -> tuple[list[float], list[str]]:
    """What a plain client waits for each of its requests, and what failed."""
    until_s, found, failed = time.perf_counter() + seconds, list[float](), list[str]()
    while time.perf_counter() < until_s:
        try:
            found.append(await plain(url))
        except (OSError, asyncio.IncompleteReadError) as error:
            failed.append(repr(error))
        await asyncio.sleep(PACE_S)
    return found, failed


async def trial(url: str, sockets: int, seconds: float, slow: int = SLOW) -> list[Claim]:
    """All kinds of clients who hold connections. slow: how many of the slow kinds."""
    claims = list[Claim]()
    kinds: tuple[tuple[str, Holder, int, str], ...] = (
        (f"{slow} slow heads", slow_head, slow, "408"),
        (f"{slow} slow bodies", slow_body, slow, "408"),
        (f"{OVERSIZED} at once with heads that are too large", oversized, OVERSIZED, "400"),
        (f"{sockets:,} idle sockets", idle, sockets, "closed"),
        (f"{sockets:,} connections from one address", idle_of_one, sockets, "503"),
        (f"{sockets // 10:,} idle WebSockets", idle_stream, sockets // 10, "101"),
        (f"{sockets:,} handshakes with a control character", unanswerable, sockets, "400"),
    )
    for what, hold, count, expected in kinds:
        before, failed_before = await waits(url, seconds / 2)
        seen: Counter[str] = Counter()
        async with held(hold, url, count, seen):
            during, failed = await waits(url, seconds)
        was_s, is_s = statistics.median(before), statistics.median(during)
        print(f"{what}: {dict(seen.most_common())}; a plain request {was_s:.3f} s before, {is_s:.3f} s during it, "
              f"{max(during):.3f} s at most", *(failed_before + failed)[:5])  # fmt: skip
        claims += [
            none(f"{what}: plain requests that failed", len(failed_before + failed), len(before + during)),
            most(f"{what}: the median of a plain request", is_s, FACTOR * was_s + MARGIN_S, " s"),
            least(f"{what}: answered or closed as it must be ({expected})", seen[expected], 1, form=",d"),
        ]
        if hold is oversized:
            answers = sum(count for status, count in seen.items() if status.isdecimal())
            claims.append(none(f"{what}: answered otherwise", answers - seen["400"]))
        if hold in (idle, idle_stream):
            claims.append(least(f"{what}: open at once", seen["most open"], 0.99 * count, form=",.0f"))
        await gone(url)
    return claims


async def readers_trial(url: str, seconds: float, readers: int = READERS) -> list[Claim]:
    """Slow readers of large answers of three kinds at once: what the server takes for them, and what it answers."""
    model = json.loads((await ask(url, "GET", "/model")).body)["name"]
    classes = {"name": "class_label", "datatype": "INT64", "shape": [KEPT_N], "data": [0] * KEPT_N}
    seed, steps = ({"name": name, "datatype": kind, "shape": [1], "data": [4]}
                   for name, kind in (("seed", "UINT64"), ("steps", "INT32")))  # fmt: skip
    document = {"id": "a", "inputs": [classes, seed, steps]}
    job = await submitted(url, n=KEPT_N, steps=4, class_label=0)
    assert b"event: done" in (await ask(url, "GET", f"/jobs/{job}/events")).body
    kept = await ask(url, "POST", f"/v2/models/{model}/infer", json.dumps(document).encode())  # from here on it is
    assert kept.status == 200, kept
    trajectory = {"n": MADE_N, "steps": 2, "sampler": "ddpm", "class_label": 0, "guidance": 1}
    kinds = (
        ("one kept answer, each with an id", "POST", f"/v2/models/{model}/infer", "*/*", document),
        ("trajectories", "POST", "/sample", "application/vnd.tminus.trajectory", trajectory),
        ("a job's images as JSON", "GET", f"/jobs/{job}/image", "application/json", None),
    )
    seen = {what: Counter[str]() for what, *_ in kinds}
    before = most_bytes = await resident_bytes(url)
    async with AsyncExitStack() as stack:
        for what, method, path, accept, asked in kinds:
            body = b"" if asked is None else json.dumps(asked).encode()
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n"
            hold = slow_reader(f"{head}\r\n".encode() + body)
            await stack.enter_async_context(held(hold, url, readers, seen[what]))
        until_s = time.perf_counter() + READERS_S * seconds
        while any(each["200"] < readers for each in seen.values()) and time.perf_counter() < until_s:
            await asyncio.sleep(0.5)
            most_bytes = max(most_bytes, await resident_bytes(url))
    for what, each in seen.items():
        print(f"{readers} slow readers of {what}: {dict(each.most_common())}")
    print(f"the server before: {before / 1e6:,.0f} MB, at most {most_bytes / 1e6:,.0f} MB")
    answers = sum((*seen.values(),), Counter[str]())
    taken = f"{3 * readers} slow readers: memory that the server took for them"
    return [
        most(taken, most_bytes - before, READERS_BYTES, " bytes"),
        least("slow readers: answered", answers["200"], 1, form=",d"),
        none("slow readers: answered otherwise", answers.total() - answers["200"] - answers["429"]),
    ]


async def submitted(url: str, **spec: object) -> str:
    """The id of a durable job."""
    return str(json.loads((await ask(url, "POST", "/jobs", json.dumps(spec).encode())).body)["id"])


async def resident_bytes(url: str) -> float:
    return (await metrics(url))["process_resident_memory_bytes"]


async def healthz_s(url: str, seconds: float) -> float:
    """Return the median time of GET /healthz on a connection of its own, asked again and again."""
    until_s, found = time.perf_counter() + seconds, list[float]()
    while time.perf_counter() < until_s or not found:
        found.append(await plain(url, "GET", "/healthz"))
        await asyncio.sleep(PACE_S)
    return statistics.median(found)


@contextmanager
def flooded(url: str, what: str) -> Iterator[None]:
    """So many clients who send this as fast as the server takes it, each on a new connection where one has ended."""
    host, port = url.removeprefix("http://").split(":")
    first, again = FLOOD[what]
    over = threading.Event()

    def flood() -> None:
        more = again if what == PLAIN else again * (2**18 // len(again))
        while not over.is_set():
            with suppress(OSError), socket.create_connection((host, int(port)), 5) as client:
                client.sendall(first)
                while not over.is_set():
                    client.sendall(more)
                    if what == PLAIN and not client.recv(4096):
                        break
                    if what == "pings":  # who reads no answer is not sent any
                        with suppress(BlockingIOError):
                            while client.recv(2**20, socket.MSG_DONTWAIT):
                                pass

    threads = [threading.Thread(target=flood) for _ in range(FLOODS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


async def floods(url: str, seconds: float) -> list[Claim]:
    """Each kind of flood, on a server that has nothing else to do and on one that runs a long job."""
    claims = list[Claim]()
    for load in ("idle", "busy"):
        job = await submitted(url, n=8, steps=1000, sampler="ddim") if load == "busy" else None
        took_s = {}
        for what in FLOOD:
            with flooded(url, what):
                await asyncio.sleep(seconds / 4)
                took_s[what] = await healthz_s(url, seconds)
            if what == PLAIN:
                print(f"{load}: GET /healthz beside {FLOODS} clients who send {what}: {took_s[what]:.4f} s")
                continue
            claims.append(most(f"{load}: GET /healthz beside {FLOODS} clients who send {what}", took_s[what],
                               FLOOD_FACTOR * took_s[PLAIN], " s"))  # fmt: skip
        if job is not None:
            await ask(url, "DELETE", f"/jobs/{job}")
    await gone(url)
    return claims


async def gone(url: str) -> None:
    """Wait until the server has noticed that all have left."""
    for _ in range(300):
        with suppress(OSError, asyncio.IncompleteReadError):
            if (await metrics(url))["process_open_fds"] < FILES:
                return
        await asyncio.sleep(0.1)
    raise AssertionError("the server still holds the connections of clients that are gone")


def allow_files(count: int) -> None:
    """For this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))


def flags_for(sockets: int) -> tuple[str, ...]:
    """Half as many again in all, half of which may be streams; from one address what is the default."""
    connections = ("--max-connections", str(sockets + sockets // 2 + 64))
    streams = ("--max-streams-per-address", str(PER_ADDRESS + 64))
    return *connections, *streams, "--max-n", str(KEPT_N), "--result-cache-mb", "64"


PARTS: dict[str, Callable[[str, int, float], Awaitable[list[Claim]]]] = {
    "holding": trial,
    "readers": lambda url, _, seconds: readers_trial(url, seconds),
    "floods": lambda url, _, seconds: floods(url, seconds / 2),
}


async def parts(url: str, sockets: int, seconds: float, only: str) -> list[Claim]:
    """All parts of the trial, or the one that is named."""
    return [claim for name in ([only] if only else PARTS) for claim in await PARTS[name](url, sockets, seconds)]


if __name__ == "__main__":
    options = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, sockets=10_000, seconds=SECONDS, only="")
    allow_files(options.sockets + options.sockets // 2 + 2 * FILES)
    clients.run_on_server(parts, flags_for(options.sockets), options)
