"""One attempt, to real servers on this machine; names are resolved as a test likes.

Signatures are compared with the example of Standard Webhooks' own libraries, and with its library for Python.
"""

import asyncio
import base64
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tests.receivers import SECRET, make_certificate, receiver, status
from tests.service.fakes import PATIENCE_S
from tminus.service.errors import InvalidField
from tminus.service.jobs.webhooks import sender as module
from tminus.service.jobs.webhooks.sender import (
    Names,
    NotDelivered,
    Sender,
    read_secrets,
    read_secrets_of,
    signed_headers,
)
from tminus.service.jobs.webhooks.webhook import AllowedReceivers

LOOPBACK = "127.0.0.1"
EXAMPLE = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def send(
    url: str,
    allow: str = LOOPBACK,
    addresses: Callable[[str], list[str]] = lambda name: [name],
    tls: ssl.SSLContext | None = None,
) -> None:
    """Send a body, with names resolved by the test."""

    async def look_up(name: str, _owner: str) -> list[str]:
        return addresses(name)

    made = Sender(read_secrets(SECRET), AllowedReceivers.parse(allow), tls or ssl.create_default_context(), look_up)
    asyncio.run(made.send(url, "completed_1", b'{"state": "done"}'))


def failure(url: str, *args: object, **kwargs: object) -> str:
    with pytest.raises(NotDelivered) as caught:
        send(url, *args, **kwargs)  # type: ignore[arg-type]
    return caught.value.reason


def test_a_body_arrives_signed_at_the_path_and_query_of_the_url() -> None:
    with receiver() as there:
        send(f"{there.url}/hook/%20x?token=s3cret")
    (told,) = there.told
    assert told.path == "/hook/%20x?token=s3cret"
    assert told.document == {"state": "done"}
    assert told.headers["host"] == f"127.0.0.1:{there.port}"
    assert told.headers["content-type"] == "application/json"
    assert there.refused == []


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as proxy, receiver() as there:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        send(there.url)
    assert len(there.told) == 1
    assert proxy.told == []
    assert proxy.refused == []


def test_a_redirect_is_not_followed() -> None:
    with receiver() as target, receiver(status(302, Location=f"{target.url}/x")) as there:
        assert "302, a redirect" in failure(there.url)
    assert target.told == []


@pytest.mark.parametrize(("code", "is_final"), [(400, False), (404, False), (410, True), (429, False), (500, False)])
def test_an_answer_that_is_no_success_is_a_failure_and_410_the_last(code: int, is_final: bool) -> None:
    with receiver(status(code)) as there, pytest.raises(NotDelivered) as caught:
        send(there.url)
    assert caught.value.is_final == is_final
    assert caught.value.reason == f"the receiver answered {code}"


def test_what_comes_after_the_head_of_an_answer_is_not_read_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ATTEMPT_S", 5.0)
    over, sent = threading.Event(), 0

    def endless(request: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        while True:
            sent += request.wfile.write(b"x" * 4096)

    def slow_body(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "10")
        request.end_headers()
        over.wait(30)

    def broken_body(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"no chunk\r\n")

    began_s = time.monotonic()
    for answer in (slow_body, broken_body, endless):
        with receiver(answer) as there:
            send(there.url)
            over.set()
    assert time.monotonic() - began_s < 4
    assert sent < 64 * 2**20  # what kernels buffer, and no more


def test_a_receiver_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPT_S", 0.3)
    over = threading.Event()
    with receiver(lambda _request: over.wait(10) and None) as there:
        assert failure(there.url) == "no answer within 0.3 s"
        over.set()
    with socket.create_server((LOOPBACK, 0)) as silent:  # it listens, and never answers
        assert failure(f"http://127.0.0.1:{silent.getsockname()[1]}/") == "no answer within 0.3 s"


def test_what_is_no_http_or_breaks_off_is_a_failure() -> None:
    def garbage(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"\x00\x01 not HTTP\r\n\r\n")

    def nothing(request: http.server.BaseHTTPRequestHandler) -> None:
        request.connection.shutdown(socket.SHUT_RDWR)

    def long_head(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 2**20)

    for answer in (garbage, nothing, long_head):
        with receiver(answer) as there:
            assert "the connection broke, or the answer is not HTTP" in failure(there.url)
    with socket.create_server((LOOPBACK, 0)) as closed:
        port = closed.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}/") == "no connection could be made"


# --- where names lead ---


def test_a_name_that_leads_to_a_private_address_is_not_connected_to() -> None:
    with receiver() as there:
        for found in ([LOOPBACK], ["::ffff:127.0.0.1"], ["10.1.1.1", LOOPBACK], ["169.254.169.254"]):
            reason = failure(f"https://hooks.example:{there.port}/", "", lambda _name, found=found: found)
            assert "leads to no public address" in reason
    assert there.told == there.refused == []


def test_what_is_connected_to_is_what_was_checked_whatever_the_name_server_says_next() -> None:
    """DNS rebinding: an answer that changes between the check and the connection."""
    answers = [["1.1.1.1"], [LOOPBACK], [LOOPBACK]]
    asked: list[str] = []

    def rebinding(name: str) -> list[str]:
        asked.append(name)
        return answers.pop(0)

    connected: list[str] = []

    class Backend(module.httpcore.AnyIOBackend):
        async def connect_tcp(self, host: str, *args: object, **kwargs: object) -> None:  # type: ignore[override]
            connected.append(host)
            raise module.httpcore.ConnectError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.httpcore, "AnyIOBackend", Backend)
        assert failure("https://hooks.example/", "", rebinding) == "no connection could be made"
        assert "no public address" in failure("https://hooks.example/", "", rebinding)
    assert connected == ["1.1.1.1"], "by its number, and nothing for the second answer"
    assert asked == ["hooks.example"] * 2


def test_a_listed_name_may_lead_anywhere_and_its_next_address_is_tried_where_one_does_not_answer() -> None:
    with receiver() as there:
        send(f"http://hooks.internal:{there.port}/", "hooks.internal", lambda _name: ["127.9.9.9", LOOPBACK])
    assert [told.headers["host"] for told in there.told] == [f"hooks.internal:{there.port}"]


def test_a_name_that_is_not_known_is_a_failure_like_one_that_leads_inside(caplog: pytest.LogCaptureFixture) -> None:
    def unknown(_name: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with caplog.at_level("INFO"):
        reason = failure("https://hooks.example/", "", unknown)
    assert reason == failure("https://hooks.example/", "", lambda _name: ["10.0.0.1"]), "clients learn no difference"
    assert "hooks.example cannot be resolved: Name or service not known" in caplog.text


def test_a_url_that_is_not_allowed_any_more_is_refused_before_anything_is_sent() -> None:
    with receiver() as there, pytest.raises(InvalidField):
        send(there.url, "")
    assert there.told == []


# --- signatures ---


def secret_of(size: int) -> str:
    return "whsec_" + base64.b64encode(bytes(range(size))).decode()


def test_the_signature_is_that_of_the_specifications_example() -> None:
    headers = signed_headers(read_secrets(EXAMPLE), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_while_a_secret_is_replaced_receivers_with_either_verify_it() -> None:
    headers = signed_headers(
        read_secrets(f"# the newest first\n{secret_of(64)}\n\n{EXAMPLE}\n"), "id", int(time.time()), b"{}"
    )
    for secret in (EXAMPLE, secret_of(64)):
        assert Webhook(secret).verify(b"{}", headers) == {}
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(b"{ }", headers)
    late = signed_headers(read_secrets(EXAMPLE), "id", int(time.time()) - 3600, b"{}")
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(EXAMPLE).verify(b"{}", late)


@pytest.mark.parametrize(
    "text",
    [
        "# none",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        secret_of(23),
        secret_of(65),
        EXAMPLE + "!",
        "\n".join([EXAMPLE] * 9),
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        read_secrets(text)
    file = tmp_path / "secrets"
    file.write_text(text)
    with pytest.raises(ValueError, match="secret") as of_file:
        read_secrets_of(file)
    for error in (caught, of_file):
        assert "MfKQ9r8" not in str(error.value)


def test_a_file_that_cannot_be_one_of_secrets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_secrets_of(tmp_path / "none")
    (tmp_path / "large").write_text("#" * 5000)
    with pytest.raises(ValueError, match="more than 4096 bytes"):
        read_secrets_of(tmp_path / "large")
    (tmp_path / "strange").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="other characters"):
        read_secrets_of(tmp_path / "strange")
    good = tmp_path / "good"
    good.write_text(f"{EXAMPLE}\n")
    assert read_secrets_of(good) == read_secrets(EXAMPLE)


# --- TLS ---


def test_a_certificate_is_checked_by_the_name_in_the_url(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    trusting = ssl.create_default_context(cafile=str(certificate))
    with receiver(certificate=certificate) as there:
        url = f"{there.url}/x"
        send(url, "localhost", lambda _name: [LOOPBACK], trusting)
        assert "certificate is not valid" in failure(url, "localhost", lambda _name: [LOOPBACK])
        other = url.replace("localhost", "hooks.internal")
        reason = failure(other, "hooks.internal", lambda _name: [LOOPBACK], trusting)
        assert "certificate is not valid" in reason
        assert "hooks.internal" in reason
    assert len(there.told) == 1
    with receiver() as plain:
        assert "TLS failed" in failure(plain.url.replace("http", "https"))


# --- names, in threads of their own: one that no server answers for holds nobody else ---


def test_a_name_of_this_machine_and_an_address_are_found() -> None:
    assert "127.0.0.1" in asyncio.run(Names().look_up("localhost"))
    assert asyncio.run(Names().look_up("127.0.0.1")) == ["127.0.0.1"]
    assert asyncio.run(Names().look_up("::1")) == ["::1"]


@pytest.mark.parametrize("name", ["no-such-name.invalid", "a" * 64 + ".example", "\udcff"])
def test_a_name_that_is_none_is_an_os_error(name: str) -> None:
    with pytest.raises(OSError, match=r".+"):
        asyncio.run(Names().look_up(name))


def test_a_name_that_hangs_takes_one_thread_and_others_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, asked = threading.Event(), list[str]()
    look_up = socket.getaddrinfo

    def slow(name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        if name.startswith("slow"):
            assert hangs.wait(PATIENCE_S)
            name = "127.0.0.1"
        return look_up(name, *args, **kwargs)

    monkeypatch.setattr(module.socket, "getaddrinfo", slow)
    monkeypatch.setattr(module, "MOST_LOOKUPS", 4)

    async def run() -> None:
        names = Names()
        waiting = [asyncio.create_task(names.look_up("slow.example")) for _ in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            while "slow.example" not in asked:  # noqa: ASYNC110  a thread says it
                await asyncio.sleep(0)
            assert await names.look_up("127.0.0.2") == ["127.0.0.2"]
            other = asyncio.create_task(names.look_up("slow2.example"))
            while "slow2.example" not in asked:  # noqa: ASYNC110
                await asyncio.sleep(0)
            with pytest.raises(module.NamesBusy):
                await names.look_up("127.0.0.3")
            assert await names.look_up("127.0.0.3", "another owner") == ["127.0.0.3"]
            waiting[0].cancel()
            with suppress(asyncio.CancelledError):
                await waiting[0]
            assert await names.look_up("127.0.0.3") == ["127.0.0.3"], "what is given up is nobody's share"
            hangs.set()
            assert await asyncio.gather(*waiting[1:], other) == [["127.0.0.1"]] * 5
            assert await names.look_up("127.0.0.3") == ["127.0.0.3"]

    asyncio.run(run())
    assert asked.count("slow.example") == 1
