"""Checks on a request's Host, and on the site of the page for which a browser sends it.

A page of another site can make a browser send requests here. By DNS rebinding it can even read the answers. Headers
that only the browser writes identify such a page: Origin, Sec-Fetch-Site, and a Host that is not ours. Programs other
than browsers send neither Origin nor Sec-Fetch-Site.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from tminus.service.api.answers.headers import HEADERS
from tminus.service.errors import ForeignHost, ForeignOrigin, short

# Probes may use any name that the network has for this machine.
HEALTH = ("/healthz", "/readyz", "/health", "/v2/health/live", "/v2/health/ready")
PROBES = (*HEALTH, "/metrics")
READING = ("GET", "HEAD", "OPTIONS")
ANY = "*"
OF_A_MODEL = re.compile(r"^/models/[^/]+(?=/)")  # the prefix of a path of one model
# Headers of answers that pages of other origins may read. The last three belong to deprecated calls.
EXPOSED_HEADERS = (*HEADERS, "Deprecation", "Sunset", "Link")


@dataclass(frozen=True, slots=True)
class AllowedSites:
    """The names of this server, besides localhost and IP addresses, and the origins of other pages that may use it.

    Both are in lower case. "*" allows any.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def check(self, scope: Scope) -> None:
        """Raise ForeignHost or ForeignOrigin for a request that must be refused."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if scope["path"] not in PROBES:
            self.check_host(host)
        if not _costs(scope):
            return
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return  # not from a page, or from one of ours
        if origin is None:  # an image or a link, for which browsers send no Origin
            origin = headers.get("referer", "")
        if not self._is_allowed(origin.lower(), host):
            bound = "the server's own, or one in --allowed-origins"
            raise ForeignOrigin(
                f"pages of {short(origin)} may not use this server", field="Origin", value=origin, bound=bound
            )

    def check_host(self, host: str) -> None:
        """Raise ForeignHost for a name that this server does not have."""
        if not self._is_ours(host.lower()):
            bound = "localhost, an IP address, or a name in --host or --allowed-hosts"
            raise ForeignHost(f"this server is not known as {short(host)}", field="Host", value=host, bound=bound)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None:
            return not host  # HTTP/1.0 names none
        return ANY in self.hosts or name == "localhost" or name in self.hosts or _is_address(name)

    def _is_allowed(self, origin: str, host: str) -> bool:
        """Return whether an origin is allowed. The scheme of our own pages is ignored, because a TLS proxy hides it."""
        scheme, _, rest = origin.partition("://")
        origin_host = rest.partition("/")[0]
        return ANY in self.origins or f"{scheme}://{origin_host}" in self.origins or (origin_host == host != "")


def _costs(scope: Scope) -> bool:
    """Return whether a request starts work, changes something, or returns somebody's jobs."""
    path = OF_A_MODEL.sub("", scope["path"])
    # The router matches /sample with a line break after it, too.
    if scope["type"] == "websocket" or scope["method"] not in READING or not path.isprintable():
        return True
    return scope["method"] != "OPTIONS" and (path in ("/sample", "/batch") or path.startswith("/jobs"))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
