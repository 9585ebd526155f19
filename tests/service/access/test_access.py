import pytest

from tests.service.keys import access_of, key_line
from tminus.service.access.access import ANYBODY, Access
from tminus.service.errors import AdminOff, Forbidden, Unauthorized

LINES = key_line("studio", "s", jobs=3), key_line("ops", "o", "admin")


def test_an_open_server_lets_anybody_sample() -> None:
    for access in (Access(), access_of(*LINES, is_open=True)):
        caller = access.without_secret()
        assert (caller.name, caller.role, caller.sees) == (ANYBODY, "sample", ANYBODY)
        assert caller.allowance is None


def test_one_with_keys_asks_for_one() -> None:
    access = access_of(*LINES)
    with pytest.raises(Unauthorized) as caught:
        access.without_secret()
    assert caught.value.headers["WWW-Authenticate"] == 'Bearer realm="tminus"'
    with pytest.raises(Unauthorized, match="not known") as caught:
        access.with_secret("x-secret")
    assert "x-secret" not in caught.value.detail
    assert access.has_keys
    assert not Access().has_keys


def test_secrets_of_one_name_share_its_usage() -> None:
    access = access_of(
        key_line("a", "one", row_steps_per_minute=60),
        key_line("a", "two", row_steps_per_minute=60),
        key_line("b", "three", row_steps_per_minute=60),
    )
    with access.with_secret("one").charged(40, 0):
        pass
    left = [access.with_secret(secret).allowance for secret in ("two", "three")]
    assert [each.left for each in left if each] == [40 - 20, 60]


def test_only_admins_change_the_server() -> None:
    access = access_of(*LINES, is_open=True)
    access.check_admin(access.with_secret("o"))
    with pytest.raises(Forbidden, match="studio has the role sample"):
        access.check_admin(access.with_secret("s"))
    with pytest.raises(Unauthorized, match="role admin"):
        access.check_admin(access.without_secret())
    for without in (Access(), access_of(LINES[0], is_open=True)):
        with pytest.raises(AdminOff):
            without.check_admin(without.without_secret())
