"""Hostile dialogues over WS /sample/stream: bytes that are no frames, frames no messages, messages no specs.

A real server of a small network is talked to over raw sockets. Afterwards it must have logged no error, hold no row and
no stream, and answer a request with the same bytes as before.
"""

import base64
import json
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from bench.servers import options_of, sum_metrics
from tests.e2e.conftest import RunningServer, start_server, stop_server
from tests.service.keys import bearer, key_line
from tests.trials.checkpoints import make

KEY = "tm_of_the_trial"
SETTLE_S = 30.0
SPEC = {"n": 2, "steps": 5, "seed": 1}
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
PATHS = ("/sample/stream?n=1", "/models/x/sample/stream", "/sample", "/", "//", "/sample/stream/", "*")
HEADERS: tuple[dict[str, str], ...] = (
    *({f"X-{i}": "x" for i in range(count)} for count in (100, 200)),
    *({"X-Long": "x" * length} for length in (8000, 20_000, 100_000)),
    *({"Origin": origin} for origin in ("https://evil.example", "null", "", "http://127.0.0.1:1")),
    *(
        {"Authorization": text}
        for text in ("Bearer wrong", "Bearer", "Bearer \x00", "Basic eA==", "Bearer " + "x" * 4000)
    ),
    {"Content-Length": "10"},
)
OPTIONS: tuple[tuple[float, str, tuple[Any, ...]], ...] = (  # of a spec, and how often it has them
    (0.5, "sampler", ("ddpm", "ddim", "dpmpp_2m", "unipc", "heun")),
    (0.5, "every", (1, 2, 7)),
    (0.3, "show", ("x_t", "x_0", ["x_t", "x_0"])),
    (0.2, "layout", ("images",)),
    (0.2, "frame_format", ("png", "webp", "jpeg")),
    (0.4, "keep_open", (True,)),
    (0.1, "deadline_s", (0.001, 0.1, 60)),
)
BAD_VALUES = (
    *(None, -1, 0, 10**30, 1.5, float("nan"), float("inf"), True),
    *("", "x" * 5000, "iVBORw0KGgo=", [], [1] * 5000, {}),
)


def frame(payload: bytes, draw: random.Random, opcode: int = TEXT, *, fin: bool = True, clean: bool = True) -> bytes:
    """One frame of a client (RFC 6455, 5.2); unless clean, with a wrong bit in its head, its length or its mask."""
    size, masked = len(payload), 0x80 if clean or draw.random() < 0.8 else 0
    data = bytearray([(0x80 if fin else 0) | opcode])
    if size < 126:
        data.append(masked | size)
    elif size < 2**16:
        data += struct.pack(">BH", masked | 126, size)
    else:
        data += struct.pack(">BQ", masked | 127, size)
    data += bytes(4 if masked else 0) + payload  # a mask of zeros
    if not clean:
        data[draw.choice((0, 0, 1, 1, 2, 9)) % len(data)] ^= 1 << draw.randrange(8)
    return bytes(data)


def handshake(draw: random.Random, *, clean: bool, keyed: bool) -> bytes:
    """The head of a WebSocket; unless clean, with something wrong."""
    headers = {
        "Host": "127.0.0.1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(draw.randbytes(16)).decode(),
        "Sec-WebSocket-Version": "13",
    }
    if keyed:
        headers |= bearer(KEY)
    path, method = "/sample/stream", "GET"
    if not clean:
        wrong = draw.choice(("missing", "value", "path", "method", "header", "header", "header"))
        name = draw.choice(sorted(headers))
        if wrong == "missing":
            del headers[name]
        elif wrong == "value":
            headers[name] = draw.choice(("", "x", "12", "websocket, h2c", "\x01", "é"))
        elif wrong == "path":
            path = draw.choice(PATHS)
        elif wrong == "method":
            method = draw.choice(("POST", "HEAD", "BREW", ""))
        else:
            headers |= draw.choice(HEADERS)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def spec_of(draw: random.Random) -> dict[str, Any]:
    """A job that is good, or nearly."""
    spec: dict[str, Any] = {"n": draw.choice((1, 2, 4)), "steps": draw.choice((1, 2, 5, 20, 1000))}
    for likely, name, values in OPTIONS:
        if draw.random() < likely:
            spec[name] = draw.choice(values)
    if draw.random() < 0.3:
        name = draw.choice([*spec, "class_label", "image", "mask", "strength", "guidance", "eta", "seed", "x"])
        spec[name] = draw.choice(BAD_VALUES)
    return spec


def message(draw: random.Random) -> bytes:
    """What is in a text frame."""
    kind = draw.choice(("spec", "spec", "spec", "cancel", "key", "other", "broken", "deep", "bytes", "big"))
    if kind == "spec":
        return json.dumps(spec_of(draw)).encode()
    if kind == "key":
        secret = draw.choice((KEY, KEY, "wrong", "", None, 5, ["x"], "x" * 2000, "\ud800"))
        return json.dumps({"type": "key", "key": secret}).encode()
    return {
        "cancel": b'{"type": "cancel"}',
        "other": draw.choice((b"1", b"null", b"[]", b'"x"', b'{"type": "x"}', b'{"type": []}', b'{"": 1}')),
        "broken": draw.choice(
            (b"", b"{", b'{"n": 1,}', b'{"n": 1} {"n": 2}', b'{"n": 1, "n": 2}', b'{"n": 1e999}', b"\xef\xbb\xbf{}")
        ),
        "deep": draw.choice((b"[", b'{"a":')) * draw.choice((100, 20_000)),
        "bytes": draw.randbytes(draw.choice((1, 10, 1000))),
        "big": b'{"image": "' + b"A" * draw.choice((10_000, 1_000_000)) + b'"}',
    }[kind]


def talk(url: str, number: int, seed: int) -> Counter[str]:
    """One dialogue. Counts what the server answered, by status and code."""
    draw = random.Random(f"{seed} {number}")
    host, port = url.removeprefix("http://").split(":")
    received = bytearray()
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as sock:

        def listen(seconds: float) -> None:
            sock.settimeout(seconds)
            with suppress(TimeoutError):
                while data := sock.recv(2**16):
                    received.extend(data)
                    if len(received) > 2**22:
                        return

        clean = draw.random() < 0.85
        head = handshake(draw, clean=clean, keyed=draw.random() < 0.6)
        if draw.random() < 0.03:
            head = draw.randbytes(200)
        if draw.random() < 0.03:
            head = head[: draw.randrange(len(head))]
        sock.sendall(head)
        if draw.random() < 0.8:
            listen(0.05)
        for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
            what = draw.random()
            if what < 0.6:
                sock.sendall(frame(message(draw), draw))
            elif what < 0.7:
                whole = message(draw)
                cut = draw.randrange(len(whole) + 1)
                sock.sendall(frame(whole[:cut], draw, fin=False))
                if draw.random() < 0.5:
                    sock.sendall(frame(b"x", draw, PING))
                if draw.random() < 0.8:
                    sock.sendall(frame(whole[cut:], draw, draw.choice((0, 0, 0, TEXT))))
            elif what < 0.8:
                sock.sendall(frame(message(draw), draw, clean=False))
            elif what < 0.9:
                opcode = draw.choice((BINARY, PING, PONG, 0))
                sock.sendall(frame(draw.randbytes(draw.choice((0, 1, 125, 126, 1000))), draw, opcode))
            elif what < 0.95:
                code = draw.choice((1000, 1001, 1005, 1006, 999, 0, 5000, 65535))
                body = draw.choice((b"", b"x", struct.pack(">H", code), struct.pack(">H", code) + b"\xff\xfe"))
                sock.sendall(frame(body, draw, CLOSE))
            else:
                sock.sendall(draw.randbytes(draw.choice((1, 100, 5000))))
            if draw.random() < 0.6:
                listen(draw.choice((0.005, 0.05, 0.3)))
        ending = draw.random()
        if ending < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        elif ending < 0.5:
            sock.sendall(frame(struct.pack(">H", 1000), draw, CLOSE))
            listen(0.3)
        elif ending < 0.6:
            sock.shutdown(socket.SHUT_WR)
            listen(0.2)
    counts: Counter[str] = Counter(dialogues=1)
    if (status := re.match(rb"HTTP/1.1 (\d+)", received)) is not None:
        counts[f"HTTP {status[1].decode()}"] += 1
    for code in re.findall(rb'"code": ?"(\w+)"', received):
        counts[code.decode()] += 1
    return counts


def settled(server: RunningServer) -> dict[str, float]:
    """What the server still holds, once it has let go or SETTLE_S have passed."""
    names = ("tminus_rows_active", "tminus_rows_waiting", "tminus_streams_open", "tminus_backlog_seconds")
    deadline = time.monotonic() + SETTLE_S
    while True:
        counted = sum_metrics(httpx.get(f"{server.url}/metrics", headers=bearer(KEY)).text)
        held = {name: counted[name] for name in names}
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        time.sleep(0.05)


def trial(dialogues: int, seed: int, at_once: int = 16) -> tuple[Counter[str], list[str]]:
    """Hold so many dialogues. Returns what was answered, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "net", safe=True)
        flags = ["--max-streams-per-address", "2000", "--no-exact", "--executor", "eager"]
        flags += ["--max-connections", "8192", "--max-connections-per-address", "8192"]
        server = start_server(Path(folder) / "net", *flags, TMINUS_KEYS=key_line("trial", KEY))
        try:
            before = httpx.post(f"{server.url}/sample", json=SPEC, headers=bearer(KEY)).content
            with ThreadPoolExecutor(at_once) as pool:
                counts = sum(pool.map(lambda number: talk(server.url, number, seed), range(dialogues)), Counter[str]())
            held = settled(server)
            after = httpx.post(f"{server.url}/sample", json=SPEC, headers=bearer(KEY)).content
        finally:
            status = stop_server(server)
    wrong = [f"{name} is {value}" for name, value in held.items() if value]
    wrong += [f"{counts[name]} answers of {name}" for name in counts if re.match(r"HTTP 5(?!03)|internal|engine", name)]
    wrong += [line.strip() for line in server.lines if re.search(r"Traceback| ERROR | CRITICAL ", line)][:5]
    wrong += ["another image"] if before != after or not before.startswith(b"\x89PNG") else []
    wrong += [f"exit code {status}"] if status else []
    return counts, wrong


if __name__ == "__main__":
    asked = options_of(__doc__, dialogues=5000, seed=0)
    counts, wrong = trial(asked.dialogues, asked.seed)
    print(json.dumps(dict(counts.most_common())))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
