"""Signatures, against the example of Standard Webhooks' own libraries and against its library for Python."""

import base64
import time
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tminus.service.jobs.webhooks.signing import read_secrets, read_secrets_of, signed_headers

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(bytes(range(64))).decode()


def test_the_signature_is_that_of_the_specifications_example() -> None:
    headers = signed_headers(read_secrets(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_while_a_secret_is_replaced_receivers_with_either_verify_it() -> None:
    headers = signed_headers(read_secrets(f"# the newest first\n{OTHER}\n\n{SECRET}\n"), "id", int(time.time()), b"{}")
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(b"{}", headers) == {}
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(b"{ }", headers)
    late = signed_headers(read_secrets(SECRET), "id", int(time.time()) - 3600, b"{}")
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(SECRET).verify(b"{}", late)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none",
        SECRET.removeprefix("whsec_"),
        "whsec_short",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        SECRET + "!",
        "\n".join([SECRET] * 9),
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
    good.write_text(f"{SECRET}\n")
    assert read_secrets_of(good) == read_secrets(SECRET)
