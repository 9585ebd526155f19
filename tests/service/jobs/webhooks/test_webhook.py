"""Which URLs and addresses may be told, by tables and by properties."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.errors import InvalidField
from tminus.service.jobs.webhooks.webhook import MAX_URL, AllowedReceivers, Receiver, is_public, permitted

NOBODY = AllowedReceivers()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://hooks.example", ("https", "hooks.example", 443, "/")),
        ("https://Hooks.Example./a?b=c", ("https", "hooks.example", 443, "/a?b=c")),
        ("HTTPS://hooks.example:8443/%20/", ("https", "hooks.example", 8443, "/%20/")),
        ("https://hooks.example?x=1", ("https", "hooks.example", 443, "/?x=1")),
        ("https://1.1.1.1/x", ("https", "1.1.1.1", 443, "/x")),
        ("https://[2606:4700::1111]:8443/x", ("https", "2606:4700::1111", 8443, "/x")),
        ("https://xn--bcher-kva.example/", ("https", "xn--bcher-kva.example", 443, "/")),
        ("https://under_score.example/", ("https", "under_score.example", 443, "/")),
    ],
)
def test_a_public_url_is_read(url: str, parts: tuple[str, str, int, str]) -> None:
    found = Receiver.parse(url, NOBODY)
    assert (found.scheme, found.host, found.port, found.target) == parts


@pytest.mark.parametrize(
    "url",
    [
        *("", "hooks.example", "//hooks.example", "ftp://hooks.example", "file:///etc/passwd", "https:///path"),
        "http://hooks.example",  # no TLS
        *("https://uname:s3cret@hooks.example/", "https://hooks.example@127.0.0.1/"),
        *("https://hooks.example#fragmentary", "https://hooks.example/#fragmentary", "https://hooks.example/a b"),
        "https://hooks.example/\r\nHost: x",
        *("https://hooks.example\\@127.0.0.1/", "https://hooks.example/\\x", "https://bücher.example/"),
        *(f"https://hooks.example:{port}/" for port in ("0", "65536", "x", "22", "25")),  # the last: SSH and mail
        *("https://-hooks.example/", "https://hooks..example/", "https://hooks.example/" + "a" * MAX_URL),
        *("https://localhost/", "https://a.localhost:8443/", "https://printer.local/"),
        "https://metadata.google.internal/computeMetadata/v1/",
        *(
            f"https://{host}/"
            for host in ("127.0.0.1", "127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1", "127.0.0.1.")
        ),
        *(f"https://{host}/" for host in ("0.0.0.0", "10.0.0.1", "100.64.0.1", "168.63.129.16", "255.255.255.255")),
        "https://169.254.169.254/latest/meta-data/",
        *(f"https://[{host}]/" for host in ("::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1%25eth0")),
        *(f"https://[{host}]/" for host in ("fd00:ec2::254", "2002:7f00:1::", "::7f00:1")),
    ],
)
def test_a_url_that_leads_elsewhere_is_refused_by_name_without_its_path(url: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Receiver.parse(url, NOBODY)
    problem = caught.value.problem()
    assert (problem["field"], problem["code"]) == ("webhook", "invalid_field")
    assert problem["bound"]
    for secret in ("passwd", "s3cret", "uname", "fragmentary", "meta-data", "computeMetadata", "aaaa"):
        assert secret not in str(problem)


def test_a_character_that_is_a_letter_of_ascii_in_another_case_is_none_here() -> None:
    """U+017F is an s in capitals, U+212A a k in small letters."""
    alike = [
        each
        for each in map(chr, range(0x80, 0x3000))
        if not all(part > "\x7f" for part in each.lower() + each.upper() + each.casefold())
    ]
    assert {"\u017f", "\u0130", "\u0131", "\u212a"} <= {*alike}
    for each in alike:
        for url in ("https://ho{}t.example/", "https://{}/", "https://hooks.example/{}", "https://hooks.example?{}"):
            with pytest.raises(InvalidField):
                Receiver.parse(url.format(each), NOBODY)
        with pytest.raises(ValueError, match="is not a name, an address or a network"):
            AllowedReceivers.parse(f"hooks.example,ho{each}t")


@pytest.mark.parametrize(
    ("allow", "url"),
    [
        ("hooks.internal", "http://hooks.internal/x"),
        ("Hooks.Internal.", "http://hooks.internal:25/x"),
        ("10.0.0.0/8", "http://10.2.3.4:81/"),
        ("127.0.0.1", "http://127.0.0.1:9000/"),
        ("localhost, 192.168.1.5", "http://localhost:9000/"),
        ("::1", "http://[::1]:9000/"),
        ("fd00::/8", "http://[fd12::1]/"),
    ],
)
def test_what_is_listed_may_be_private_and_plain_and_on_any_port(allow: str, url: str) -> None:
    Receiver.parse(url, AllowedReceivers.parse(allow))
    with pytest.raises(InvalidField):
        Receiver.parse(url, NOBODY)
    with pytest.raises(InvalidField):
        Receiver.parse(url, AllowedReceivers.parse("10.99.0.0/16,other.internal"))


@pytest.mark.parametrize(
    "text", ["a b", "http://hooks", "10.0.0.0/33", "10.0.0.1/8", "127.1", "0x7f", "*", "-a", "a..b"]
)
def test_a_list_with_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a name, an address or a network"):
        AllowedReceivers.parse(f"hooks.internal,{text}")


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


# IANA's registries of special-purpose addresses, and the metadata services of clouds.
SPECIAL = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24"),
    *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("168.63.129.16/32", "100.100.100.200/32", "192.0.0.0/24", "192.88.99.0/24"),
    *("::/128", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8", "2001:db8::/32", "2002::/16", "2001::/23", "::/96"),
    *("64:ff9b:1::/48", "100::/64", "fec0::/10", "3fff::/20", "5f00::/16"),
]


@given(st.sampled_from(SPECIAL), st.integers(0, 2**128 - 1))
def test_no_special_address_is_public_nor_what_has_one_of_ipv4_in_it(network: str, offset: int) -> None:
    within = ipaddress.ip_network(network)
    address = within[offset % within.num_addresses]
    assert not is_public(address)
    if isinstance(address, ipaddress.IPv4Address):
        for around in ("::ffff:0:0", "64:ff9b::"):
            assert not is_public(ipaddress.IPv6Address(int(ipaddress.IPv6Address(around)) | int(address)))


def test_of_a_names_addresses_those_are_taken_that_may_be_connected_to() -> None:
    found = ["127.0.0.1", "1.1.1.1", "10.1.2.3", "fe80::1%eth0", "2606:4700::1111"]
    named = Receiver.parse("https://hooks.example/", NOBODY)
    assert permitted(named, found, NOBODY) == ["1.1.1.1", "2606:4700::1111"]
    assert permitted(named, found, AllowedReceivers.parse("10.0.0.0/8")) == ["1.1.1.1", "10.1.2.3", "2606:4700::1111"]
    assert permitted(named, found, AllowedReceivers.parse("hooks.example")) == found
    assert permitted(named, ["127.0.0.1"], NOBODY) == []
