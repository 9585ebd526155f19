"""The receivers that a job's webhook may name, and the addresses that the server may connect to.

This module does no I/O.

Clients choose the URLs that the server sends requests to. Such a URL must not reach services that only the server can
reach: other services on its machine and network, and metadata services of clouds (OWASP, "Server-Side Request Forgery
Prevention").
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Literal, get_args

from tminus.service.errors import InvalidField

Event = Literal["start", "output", "completed"]
EVENTS: tuple[Event, ...] = get_args(Event)  # in order of occurrence

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Without re.ASCII, [a-z] with IGNORECASE also matches the long s, the dotless i, the dotted I and the Kelvin sign.
IN_ASCII = re.IGNORECASE | re.ASCII
MAX_URL = 1024  # characters; form fields are limited to the same number of bytes
URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][!\"$-\[\]-~]*)?",  # ASCII without # and the backslash, which some parsers read as a slash
    IN_ASCII,
)
NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?", IN_ASCII)
# Matches a numeric last label. Resolvers read such names as addresses: 127.1, 0x7f.1 and 2130706433 are all 127.0.0.1.
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", IN_ASCII)
LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa")  # RFC 6761, RFC 6762, RFC 8375
WELL_KNOWN_PORTS = {"http": 80, "https": 443}
LEAST_PORT = 1024  # ports below this are refused, except 80 and 443, to protect mail and name servers
UNICAST = IPv6Network("2000::/3")  # IANA assigns public IPv6 addresses only from this network
# IPv6 networks that embed IPv4 addresses: IPv4-mapped (RFC 4291) and NAT64 (RFC 6052).
WITH_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
# Addresses in IANA's special-purpose registries that `ipaddress` treats as public in some Python releases, the networks
# of the IPv4 tunnels 6to4 and Teredo, and the address of Azure's metadata service.
REFUSED: tuple[Network, ...] = (
    *map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")),
    *map(IPv6Network, ("2001::/23", "2002::/16", "3fff::/20")),
)
ORIGIN = re.compile(r"([A-Za-z]+://)(?:[^/?#\\]*@)?([^/?#\\@\s]*)")
ORIGIN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Webhook:
    """The receiver of a job's events, and the events to send. The URL's path and query may contain secrets."""

    url: str
    events: tuple[Event, ...] = EVENTS

    @property
    def receiver(self) -> str:
        """The scheme, host and port of the URL, which are not secret."""
        return origin_of(self.url)

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "events": list(self.events)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Webhook":
        """Parse a stored webhook. Raises KeyError, TypeError or ValueError if it is malformed."""
        events = tuple(event for event in EVENTS if event in fields["events"])
        if not isinstance(fields["url"], str) or len(events) != len(fields["events"]):
            raise ValueError("it is no webhook")
        return cls(fields["url"], events)


@dataclass(frozen=True, slots=True)
class AllowedReceivers:
    """Receivers that may have a private address, use plain HTTP and listen on any port."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "AllowedReceivers":
        """Parse a comma-separated list of names, addresses and networks. Raises ValueError if it is malformed."""
        hosts, networks = set(), list[Network]()
        for entry in filter(None, (each.strip() for each in text.split(","))):
            try:
                networks.append(ip_network(entry.strip("[]")))
            except ValueError:
                if not NAME.fullmatch(entry) or NUMBER.fullmatch(_last_label(entry)):
                    raise ValueError(f"{entry} is not a name, an address or a network, such as 10.1.0.0/16") from None
                hosts.add(entry.lower().rstrip("."))
        return cls(frozenset(hosts), tuple(networks))

    def names(self, host: str) -> bool:
        """Return True if the list contains this host, given by name or address."""
        address = _address(host)
        return host in self.hosts or (address is not None and self.has(address))

    def has(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A checked URL to which the server may send requests."""

    scheme: str
    host: str  # in lower case, without brackets and without a trailing dot
    port: int
    target: str  # path and query

    @classmethod
    def parse(cls, url: str, allowed: AllowedReceivers) -> "Receiver":
        """Parse and check the URL of a webhook. Raises InvalidField, which shows only the URL's origin."""
        if len(url) > MAX_URL:
            raise refused(f"a URL of at most {MAX_URL} characters", url)
        match = URL.fullmatch(url)
        if match is None:
            raise refused("an absolute https URL in ASCII, without user, fragment and spaces", url)
        scheme, host = match["scheme"].lower(), match["host"].lower().strip("[]").rstrip(".")
        address = _address(host)
        if address is None and (not NAME.fullmatch(host) or NUMBER.fullmatch(_last_label(host))):
            raise refused("a URL with a host name, or with an address in its usual form", url)
        listed = allowed.names(host)
        if scheme != "https" and not listed:
            raise refused("an https URL, or the URL of a host that --webhook-allow lists", url)
        port = int(match["port"] or WELL_KNOWN_PORTS[scheme])
        if not 1 <= port <= 65535:
            raise refused("a URL with a port in 1..65535", url)
        if port < LEAST_PORT and port not in WELL_KNOWN_PORTS.values() and not listed:
            raise refused(f"a URL with port 443, 80, or {LEAST_PORT} and above", url)
        is_local = address is None and any(f".{host}".endswith(f".{name}") for name in LOCAL_NAMES)
        if (is_local or (address is not None and not is_public(address))) and not listed:
            raise refused("the URL of a public host, or of one that --webhook-allow lists", url)
        target = match["target"] or "/"
        return cls(scheme, host, port, target if target.startswith("/") else f"/{target}")

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == WELL_KNOWN_PORTS[self.scheme] else f"{host}:{self.port}"


def permitted(receiver: Receiver, addresses: Iterable[str], allowed: AllowedReceivers) -> list[str]:
    """Return those of the resolved addresses that the server may connect to."""
    by_number = {each: ip_address(each.partition("%")[0]) for each in addresses}
    listed = receiver.host in allowed.hosts
    return [each for each, address in by_number.items() if listed or is_public(address) or allowed.has(address)]


def is_public(address: Address) -> bool:
    """Return True for a public unicast address.

    Local, private and special-purpose addresses are not public, nor are the metadata services of clouds.
    """
    if isinstance(address, IPv6Address):
        for network in WITH_IPV4:
            if address in network:
                return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address not in UNICAST:
            return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global
    return not special and not any(address in network for network in REFUSED)


def refused(bound: str, url: str) -> InvalidField:
    """Return the error for a URL. It shows only the origin, because errors are logged and the rest may be secret."""
    return InvalidField.of("webhook", bound, origin_of(url))


def _address(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _last_label(host: str) -> str:
    return host.rstrip(".").rpartition(".")[2]


def origin_of(url: str) -> str:
    """Return the scheme, host and port of a URL, even if malformed. Drop user, path and query, which may be secret."""
    found = ORIGIN.match(url)
    return (found[1] + found[2]).lower()[:ORIGIN_CHARACTERS] if found else "no URL"
