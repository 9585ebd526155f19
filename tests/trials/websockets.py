"""Hostile dialogues over WS /sample/stream: bytes that are no frames, frames no messages, messages no specs.

A real server of a small network is talked to over raw sockets. Afterwards it must have logged no error, hold no row and
no stream, and answer a request with the same bytes as before.
"""

import argparse
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

from tests.e2e.conftest import RunningServer, start_server, stop_server
from tests.service.keys import bearer, key_line
from tests.trials.checkpoints import make

KEY = "tm_of_the_trial"
SETTLE_S = 30.0
SPEC = {"n": 2, "steps": 5, "seed": 1}
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(payload: bytes, draw: random.Random, opcode: int = TEXT, *, fin: bool = True, clean: bool = True) -> bytes:
    """One frame of a client (RFC 6455, 5.2); unless clean, with something wrong in its head."""
    first, masked, size = (0x80 if fin else 0) | opcode, True, len(payload)
    if not clean:
        wrong = draw.choice(("reserved", "opcode", "unmasked", "size", "long"))
        if wrong == "reserved":
            first |= draw.choice((0x10, 0x20, 0x40, 0x70))
        elif wrong == "opcode":
            first = 0x80 | draw.choice((3, 4, 5, 6, 7, 11, 15))
        elif wrong == "unmasked":
            masked = False
        elif wrong == "size":
            size = draw.choice((2**63 + 1, 2**62, 2**40, 2**25))
        else:
            size += draw.choice((1, 100))
    head = bytes([first])
    bit = 0x80 if masked else 0
    if size < 126:
        head += bytes([bit | size])
    elif size < 2**16:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    mask = draw.randbytes(4)
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


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
        wrong = draw.choice(("missing", "value", "path", "method", "many", "long", "origin", "key", "body"))
        name = draw.choice(sorted(headers))
        if wrong == "missing":
            del headers[name]
        elif wrong == "value":
            headers[name] = draw.choice(("", "x", "12", "websocket, h2c", "\x01", "é"))
        elif wrong == "path":
            path = draw.choice(
                ("/sample/stream?n=1", "/models/x/sample/stream", "/sample", "/", "//", "/sample/stream/", "*")
            )
        elif wrong == "method":
            method = draw.choice(("POST", "HEAD", "BREW", ""))
        elif wrong == "many":
            headers |= {f"X-{i}": "x" for i in range(draw.choice((100, 200)))}
        elif wrong == "long":
            headers["X-Long"] = "x" * draw.choice((8000, 20_000, 100_000))
        elif wrong == "origin":
            headers["Origin"] = draw.choice(("https://evil.example", "null", "", "http://127.0.0.1:1"))
        elif wrong == "key":
            headers["Authorization"] = draw.choice(
                ("Bearer wrong", "Bearer", "Bearer \x00", "Basic eA==", "Bearer " + "x" * 4000)
            )
        else:
            headers["Content-Length"] = "10"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def spec_of(draw: random.Random) -> dict[str, Any]:
    """A job that is good, or nearly."""
    spec: dict[str, Any] = {"n": draw.choice((1, 2, 4)), "steps": draw.choice((1, 2, 5, 20, 1000))}
    spec |= {"sampler": draw.choice(("ddpm", "ddim", "dpmpp_2m", "unipc", "heun"))} if draw.random() < 0.5 else {}
    spec |= {"every": draw.choice((1, 2, 7))} if draw.random() < 0.5 else {}
    spec |= {"show": draw.choice(("x_t", "x_0", ["x_t", "x_0"]))} if draw.random() < 0.3 else {}
    spec |= {"layout": "images", "frame_format": draw.choice(("png", "webp", "jpeg"))} if draw.random() < 0.2 else {}
    spec |= {"keep_open": True} if draw.random() < 0.4 else {}
    spec |= {"deadline_s": draw.choice((0.001, 0.1, 60))} if draw.random() < 0.1 else {}
    if draw.random() < 0.3:
        name = draw.choice([*spec, "class_label", "image", "mask", "strength", "guidance", "eta", "seed", "x"])
        spec[name] = draw.choice(
            (
                None,
                -1,
                0,
                10**30,
                1.5,
                float("nan"),
                float("inf"),
                "",
                "x" * 5000,
                [],
                [1] * 5000,
                {},
                True,
                "iVBORw0KGgo=",
            )
        )
    return spec


def message(draw: random.Random) -> bytes:
    """What is in a text frame."""
    kind = draw.choice(("spec", "spec", "spec", "cancel", "key", "other", "broken", "deep", "bytes", "empty", "big"))
    if kind == "spec":
        return json.dumps(spec_of(draw)).encode()
    if kind == "cancel":
        return b'{"type": "cancel"}'
    if kind == "key":
        secret = draw.choice((KEY, KEY, "wrong", "", None, 5, ["x"], "x" * 2000, "\ud800"))
        return json.dumps({"type": "key", "key": secret}).encode()
    if kind == "other":
        return json.dumps(
            draw.choice((1, None, [], "x", {"type": "x"}, {"type": None}, {"type": []}, {"": 1}))
        ).encode()
    if kind == "broken":
        return draw.choice(
            (b"{", b'{"n": 1,}', b'{"n": 1} {"n": 2}', b'{"n": 1, "n": 2}', b"nul", b'{"n": 1e999}', b"\xef\xbb\xbf{}")
        )
    if kind == "deep":
        return draw.choice((b"[", b'{"a":')) * draw.choice((100, 20_000))
    if kind == "bytes":
        return draw.randbytes(draw.choice((1, 10, 1000)))
    if kind == "big":
        return b'{"image": "' + b"A" * draw.choice((10_000, 1_000_000)) + b'"}'
    return b""


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
        text = httpx.get(f"{server.url}/metrics", headers=bearer(KEY)).text
        held = {name: float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1]) for name in names}  # type: ignore[index]
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        time.sleep(0.05)


def trial(dialogues: int, seed: int, at_once: int = 16) -> tuple[Counter[str], list[str]]:
    """Hold so many dialogues. Returns what was answered, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "net", safe=True)
        flags = (
            "--max-streams-per-address",
            "2000",
            "--max-connections",
            "8192",
            "--max-connections-per-address",
            "8192",
        )
        server = start_server(
            Path(folder) / "net", *flags, "--no-exact", "--executor", "eager", TMINUS_KEYS=key_line("trial", KEY)
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts, wrong = trial(asked.dialogues, asked.seed)
    print(json.dumps(dict(counts.most_common())))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
