"""A receiver of webhooks: a real HTTP server in a thread, which answers as a test likes."""

import http.server
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

from tests.tools import needs

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass(frozen=True)
class Told:
    """One request, whose signature was verified by the library of Standard Webhooks."""

    path: str
    headers: dict[str, str]
    document: dict[str, Any]

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> str:
        return self.id.partition("_")[0]


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    """Answers with a status and nothing else."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@dataclass
class Receiver:
    """What it was told, and what it answers next: the last answer again and again."""

    url: str = ""
    port: int = 0
    answers: list[Answer] = field(default_factory=lambda: [status(204)])
    told: list[Told] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # why a request was no webhook
    open: int = 0
    most_open: int = 0  # requests at a time
    lock: threading.Lock = field(default_factory=threading.Lock)

    def events(self) -> list[str]:
        return [told.event for told in self.told]

    def ids(self) -> list[str]:
        return [told.id for told in self.told]

    def wait_for(self, count: int, patience_s: float = 30.0) -> list[Told]:
        deadline = time.monotonic() + patience_s
        while len(self.told) < count:
            assert time.monotonic() < deadline, f"told {self.events()} only; refused: {self.refused}"
            time.sleep(0.005)
        return self.told


@contextmanager
def receiver(
    *answers: Answer, certificate: Path | None = None, port: int = 0, secret: str = SECRET
) -> Iterator[Receiver]:
    """Run one on this machine. certificate: a file with its key, for TLS."""
    made = Receiver(answers=list(answers) or [status(204)])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with made.lock:
                made.open += 1
                made.most_open = max(made.most_open, made.open)
                answer = made.answers.pop(0) if len(made.answers) > 1 else made.answers[0]
                try:
                    Webhook(secret).verify(body, headers)
                    made.told.append(Told(self.path, headers, json.loads(body)))
                except Exception as error:
                    made.refused.append(repr(error))
            try:
                answer(self)
            except OSError:  # the sender has read enough
                pass
            with made.lock:
                made.open -= 1

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    made.port = server.server_port
    made.url = f"http://127.0.0.1:{made.port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        made.url = f"https://localhost:{made.port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_certificate(folder: Path, name: str) -> Path:
    """A certificate of a name that it has signed itself, with its key."""
    file, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [needs("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(file)], check=True, capture_output=True)
    file.write_text(file.read_text() + key.read_text())
    return file
