import json
from pathlib import Path

import httpx
import pytest

from tminus.service.client.parameters import text_of
from tminus.service.client.transport import KeyAuth, lost, model_address


@pytest.mark.parametrize("name", ["", "..", ".", "-x", "_x", "a/b", "a b", "a?b", "a\n", "x" * 65, "é", 5])
def test_a_name_that_is_none_is_put_into_no_address(name: str) -> None:
    with pytest.raises(ValueError, match=r"model must be 1..64 of A-Z a-z 0-9 . _ -|no text"):
        model_address("http://host", name)


@pytest.mark.parametrize("key", ["", "secret\n", " secret", "secret ", "se\x00cret", "sécret", "se\r\nX-A: cret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="a key must be printable ASCII") as caught:
        KeyAuth(key)
    assert "cret" not in str(caught.value)
    assert "cret" not in repr(KeyAuth("secret"))


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


def test_pictures_among_the_parameters_are_sent_as_base64(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    file.write_bytes(b"\x00mask")
    body = json.loads(text_of({"n": 1, "image": b"\xffimage", "mask": file, "strength": 0.5}))
    assert body == {"n": 1, "image": "/2ltYWdl", "mask": "AG1hc2s=", "strength": 0.5}
    assert json.loads(text_of(body)) == body, "base64 is not encoded again"
