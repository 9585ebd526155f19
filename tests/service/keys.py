"""API keys for tests."""

from tminus.service.access.access import Access
from tminus.service.access.keys import Key, KeyLimits, KeyRing, Role, digest_of, to_line


def key_line(name: str, secret: str, role: Role = "sample", **limits: int) -> str:
    """A line of a file of keys."""
    return to_line(Key(name, role, digest_of(secret), KeyLimits(**limits)))


def access_of(*lines: str, is_open: bool = False) -> Access:
    """No time passes for it: what is used of a quota stays used."""
    return Access(KeyRing("\n".join(lines)), is_open=is_open, clock=lambda: 0.0)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}
