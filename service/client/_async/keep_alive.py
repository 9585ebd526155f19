"""Finds by TCP that a server is silently gone."""

import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# A request that may take as long as it takes has no other way to find that the server is silently gone: after a minute
# and a half. Not all systems have all of these: macOS calls the first TCP_KEEPALIVE, and only Linux has the last, which
# holds while the server has not even confirmed the request.
KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 90_000
}  # fmt: skip


async def _keep_alive(event: str, info: Mapping[str, Any]) -> None:
    """Let TCP itself ask whether the server is there, on each connection that is opened.

    For httpx's `trace`. Its transports take socket options too, but with a transport of our own it would not ask the
    environment for a proxy.
    """
    opened = info["return_value"].get_extra_info("socket") if event.endswith(".connect_tcp.complete") else None
    if opened is None:
        return
    with suppress(OSError):  # a system that refuses one does without
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


TRACED = {"trace": _keep_alive}
