"""Runs a real nginx by the configuration of docker/nginx, and a name server for it, as Docker has one."""

import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.service.fakes import wait_until
from tests.tools import needs

TEMPLATE = Path(__file__).parents[2] / "docker" / "nginx" / "tminus.conf.template"
# Id, flags, and how many questions, answers, authorities and additional records there are.
HEADER = struct.Struct("!6H")
ANSWER = struct.Struct("!HHHIH4s")  # where the name is, type, class, seconds that it holds, bytes, address
RESPONSE, NO_SUCH_NAME = 0x8180, 0x8183
IPV4, INTERNET, NAME_OF_THE_QUESTION = 1, 1, 0xC00C
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def filled(text: str, changes: dict[str, str]) -> str:
    """A configuration with what a test has to change, each in its one place."""
    for was, becomes in changes.items():
        assert text.count(was) == 1, was
        text = text.replace(was, becomes)
    return text


def write_configuration(folder: Path, servers: str) -> Path:
    """Write the whole configuration around these lines of its http block."""
    whole = f"pid {folder}/pid; daemon off; worker_processes 1;\nevents {{ worker_connections 4096; }}\n"
    whole += "http { access_log off;\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in TEMPORARY)
    (folder / "nginx.conf").write_text(f"{whole}{servers}}}\n")
    return folder / "nginx.conf"


@contextmanager
def nginx(folder: Path, servers: str, client: Callable[[], httpx.Client] | None = None) -> Iterator[None]:
    """Run it with these lines of its http block. Its log is `errors` in the folder.

    client: asks through it; it is waited for until a server answers.
    """
    write_configuration(folder, servers)
    process = subprocess.Popen([needs("nginx-light"), "-c", folder / "nginx.conf", "-e", folder / "errors"])

    def answers() -> bool:
        assert process.poll() is None, (folder / "errors").read_text()
        try:
            with client() as http:
                return http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        if client is not None:
            wait_until(answers)
        yield
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Names:
    """The addresses that a name server tells; a test changes them while it runs."""

    port: int
    addresses: dict[str, list[str]] = field(default_factory=dict)

    def answer(self, query: bytes) -> bytes:
        """Answer one question for addresses (RFC 1035)."""
        number = HEADER.unpack_from(query)[0]
        end = query.index(b"\0", HEADER.size) + 5  # of the question: type and class come after the name
        question, name, at = query[HEADER.size : end], [], HEADER.size
        while length := query[at]:
            name.append(query[at + 1 : at + 1 + length].decode())
            at += 1 + length
        found = self.addresses.get(".".join(name), [])
        records = [ANSWER.pack(NAME_OF_THE_QUESTION, IPV4, INTERNET, 600, 4, socket.inet_aton(each)) for each in found]
        flags = RESPONSE if found else NO_SUCH_NAME
        return HEADER.pack(number, flags, 1, len(found), 0, 0) + question + b"".join(records)


@contextmanager
def name_server() -> Iterator[Names]:
    """Run one on a free port of this machine."""
    with socket.socket(type=socket.SOCK_DGRAM) as channel:
        channel.bind(("127.0.0.1", 0))
        names = Names(channel.getsockname()[1])

        def serve() -> None:
            while query := channel.recvfrom(512):
                if not query[0]:
                    return
                channel.sendto(names.answer(query[0]), query[1])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield names
        with socket.socket(type=socket.SOCK_DGRAM) as closing:
            closing.sendto(b"", ("127.0.0.1", names.port))
        thread.join(10)
