"""A server on a real socket that sends what no tminus server does, and counts what it got rid of."""

import itertools
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import websockets.sync.server
from websockets.exceptions import ConnectionClosed

from tests.service.fakes import PATIENCE_S

PNG = b"\x89PNG\r\n\x1a\n"
IMAGE_HEAD = "Content-Type: image/png\r\nX-Seed: 1\r\nX-Fingerprint: f\r\n"
PIECE = bytes(2**16)


def endless(first: bytes = b"") -> Iterator[bytes]:
    return itertools.chain([first], itertools.repeat(PIECE))


class Hostile:
    """`sent`: bytes of bodies, or messages, that clients took."""

    url = ""

    def __init__(self) -> None:
        self.sent = 0


@contextmanager
def answering(head: str, pieces: Callable[[], Iterable[bytes]], status: str = "200 OK") -> Iterator[Hostile]:
    """Answer every request with a head and then pieces, and close."""
    hostile = Hostile()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += self.request.recv(2**16)
            with suppress(OSError):  # the client has had enough
                self.request.sendall(f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode())
                for piece in pieces():
                    self.request.sendall(piece)
                    hostile.sent += len(piece)
                self.request.shutdown(socket.SHUT_WR)
                self.request.settimeout(PATIENCE_S)
                while self.request.recv(2**16):  # closed with a body unread, the kernel resets the connection
                    pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        hostile.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hostile
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


@contextmanager
def streaming(messages: Callable[[], Iterable[str | bytes | dict[str, Any]]]) -> Iterator[Hostile]:
    """Answer over every WebSocket with messages, and close."""
    hostile = Hostile()

    def handle(ws: websockets.sync.server.ServerConnection) -> None:
        with suppress(ConnectionClosed):  # the client has had enough
            ws.recv()
            for message in messages():
                ws.send(json.dumps(message) if isinstance(message, dict) else message)
                hostile.sent += 1

    with websockets.sync.server.serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hostile.url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            yield hostile
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


ACCEPTED = {"type": "accepted", "id": "x", "seed": 1, "eta_s": 0.5, "position": 0, "fingerprint": "f"}
FRAME = {"type": "frame", "step": 1, "steps": 50, "t": 3, "show": "x_t", "eta_s": 0.5}
DONE = {"type": "done", "images": 1, "queue_s": 0, "first_step_s": 0, "denoise_s": 0, "frames_dropped": 0}
