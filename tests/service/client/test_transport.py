import httpx
import pytest

from tminus.service.client.transport import http_address, lost, ws_address


def test_an_address_may_have_a_path_behind_a_proxy() -> None:
    assert http_address("https://host:1/tminus/") == "https://host:1/tminus"
    assert ws_address("https://host:1/tminus") == "wss://host:1/tminus"
    assert ws_address("http://http") == "ws://http"


@pytest.mark.parametrize(
    ("error", "reached"),
    [
        (httpx.ConnectError("no"), False),
        (httpx.ConnectTimeout("no"), False),
        (ConnectionRefusedError(), False),
        (TimeoutError(), False),
        (httpx.ReadError("cut"), True),
        (httpx.ReadTimeout(""), True),
        (ConnectionResetError(), True),
    ],
)
def test_a_request_may_have_arrived_unless_there_was_no_connection(error: Exception, reached: bool) -> None:
    assert lost(error).reached == reached
    assert str(lost(error)) == (str(error) or type(error).__name__)
