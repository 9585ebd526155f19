"""Checks a request's Host, and the site of the web page from which a browser sent the request.

A page of another site can make a browser send requests to this server. With DNS rebinding, such a page can even read
the responses. Three headers, which only the browser can set, reveal such a page: Origin, Sec-Fetch-Site, and a Host
that is not a name of this server. Programs other than browsers send neither Origin nor Sec-Fetch-Site.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from tminus.service.api.answers.headers import HEADERS
from tminus.service.errors import ForeignHost, ForeignOrigin, short

# Health checks may call the server by any host name.
HEALTH = ("/healthz", "/readyz", "/health", "/v2/health/live", "/v2/health/ready")
PROBES = (*HEALTH, "/metrics")
READING = ("GET", "HEAD", "OPTIONS")
ANY = "*"
OF_A_MODEL = re.compile(r"^/models/[^/]+(?=/)")  # path prefix of one model's API
# Response headers that pages of other origins may read. The last three are sent only by deprecated calls.
EXPOSED_HEADERS = (*HEADERS, "Deprecation", "Sunset", "Link")


@dataclass(frozen=True, slots=True)
class AllowedSites:
    """The host names of this server, and the other origins whose pages may use this server.

    Both are in lower case, and "*" allows all. localhost and IP addresses are always allowed as hosts.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def check(self, scope: Scope) -> None:
        """Raise ForeignHost or ForeignOrigin if the request's host or the page that sent it is not allowed."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if scope["path"] not in PROBES:
            self.check_host(host)
        if not _costs(scope):
            return
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return  # not sent by a page, or sent by this server's own page
        if origin is None:  # browsers send no Origin for images and links
            origin = headers.get("referer", "")
        if not self._is_allowed(origin.lower(), host):
            bound = "the server's own, or one in --allowed-origins"
            raise ForeignOrigin(
                f"pages of {short(origin)} may not use this server", field="Origin", value=origin, bound=bound
            )

    def check_host(self, host: str) -> None:
        """Raise ForeignHost if `host` is not a name of this server."""
        if not self._is_ours(host.lower()):
            bound = "localhost, an IP address, or a name in --host or --allowed-hosts"
            raise ForeignHost(f"this server is not known as {short(host)}", field="Host", value=host, bound=bound)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None:
            return not host  # HTTP/1.0 requests may have no Host
        return ANY in self.hosts or name == "localhost" or name in self.hosts or _is_address(name)

    def _is_allowed(self, origin: str, host: str) -> bool:
        """Return True if pages of an origin are allowed. For our own pages the scheme is ignored.

        A TLS proxy may hide the scheme.
        """
        scheme, _, rest = origin.partition("://")
        origin_host = rest.partition("/")[0]
        return ANY in self.origins or f"{scheme}://{origin_host}" in self.origins or (origin_host == host != "")


def _costs(scope: Scope) -> bool:
    """Return True if a request starts work, changes something or returns a caller's jobs."""
    path = OF_A_MODEL.sub("", scope["path"])
    # isprintable: the router also accepts "/sample" followed by a line break.
    if scope["type"] == "websocket" or scope["method"] not in READING or not path.isprintable():
        return True
    return scope["method"] != "OPTIONS" and (path in ("/sample", "/batch") or path.startswith("/jobs"))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
