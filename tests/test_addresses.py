from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core.addresses import Address, is_wildcard, parse_address, parse_host
from netloader.errors import ConfigError, NetloaderError

LABEL = st.from_regex(r"[A-Za-z_]([A-Za-z0-9_-]{0,20}[A-Za-z0-9_])?", fullmatch=True)
NAMES = st.lists(LABEL, min_size=1, max_size=5).map(".".join)
IPV4 = st.ip_addresses(v=4).map(str)
ZONES = st.from_regex(r"%[A-Za-z0-9_.-]{1,15}", fullmatch=True)
IPV6 = st.builds(
    lambda address, long, zone: (address.exploded if long else str(address)) + zone,
    st.ip_addresses(v=6),
    st.booleans(),
    st.just("") | ZONES,
)
PORTS = st.integers(1, 65535)
ADDRESSES = st.builds(Address, NAMES | IPV4 | IPV6, PORTS)


@given(ADDRESSES)
def test_text_of_an_address_reads_back(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(IPV4 | NAMES, PORTS)
def test_ipv4_and_names_are_written_plainly(host: str, port: int) -> None:
    assert str(Address(host, port)) == f"{host.lower()}:{port}"


@given(IPV6, PORTS)
def test_ipv6_is_written_in_brackets(host: str, port: int) -> None:
    address = parse_address(f"[{host}]:{port}")
    assert str(address).startswith("[")
    assert str(address).endswith(f"]:{port}")
    assert ipaddress.IPv6Address(address.host) == ipaddress.IPv6Address(host)


@given(st.text() | st.text(alphabet="0123456789abcdef.:[]%-_ x"))
@example("[")
@example("[]:1")
@example("[[::1]]:1")
@example(":1")
@example("::1")
@example("a" * 300 + ":1")
@example("\u0661.1.1.1:80")
@example("host:\u0668\u0660")
def test_any_text_is_an_address_or_one_clean_error(text: str) -> None:
    address, error = None, None
    try:
        address = parse_address(text)
    except ConfigError as caught:
        error = caught
    if address is not None:
        assert parse_address(str(address)) == address
        assert 1 <= address.port <= 65535
        assert address.host
    else:
        assert error is not None
        assert (error.field, error.value) == ("address", text)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.170.22.152:19374", "10.170.22.152", 19374),
        ("node-7.Example:1", "node-7.example", 1),
        ("my_service:65535", "my_service", 65535),
        ("localhost:80", "localhost", 80),
        ("host.example.:80", "host.example.", 80),
        ("1a.b2:80", "1a.b2", 80),
        ("[::1]:8000", "::1", 8000),
        ("[FD00:0:0::7]:8000", "fd00::7", 8000),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
    ],
)
def test_addresses_are_parsed(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert (address.host, address.port) == (host, port)


def test_addresses_that_mean_the_same_are_equal() -> None:
    assert parse_address("Host:1") == parse_address("host:1")
    assert len({parse_address("[::0001]:1"), parse_address("[0:0::1]:1"), Address("[::1]", 1)}) == 1
    assert parse_address("[fe80::1%eth0]:1") != parse_address("[fe80::1%eth1]:1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.7", "the port is missing"),
        ("host", "the port is missing"),
        ("[::1]", "the port is missing"),
        ("[::1]8000", "the port is missing"),
        ("[::1:8000", "bracket is not closed"),
        ("::1:8000", "needs brackets"),
        ("fe80::1", "needs brackets"),
        ("[10.0.0.7]:80", "only IPv6"),
        ("[host]:80", "only IPv6"),
        ("host:", "the port is not a number"),
        ("host:0", "the port is not a number"),
        ("host:65536", "the port is not a number"),
        ("host:99999999999999999999", "the port is not a number"),
        ("host:-1", "the port is not a number"),
        ("host:+1", "the port is not a number"),
        ("host:1.0", "the port is not a number"),
        ("host:0080", "the port is not a number"),
        ("host: 80", "the port is not a number"),
        ("host:80\n", "the port is not a number"),
        ("host:²", "the port is not a number"),
        ("[::1]:", "the port is not a number"),
        (":80", "the host is missing"),
        (" host:80", "be part of a host name"),
        ("ho st:80", "be part of a host name"),
        ("-host:80", "be part of a host name"),
        ("host-:80", "be part of a host name"),
        ("a..b:80", "be part of a host name"),
        (".:80", "be part of a host name"),
        ("user@host:80", "be part of a host name"),
        ("host/path:80", "be part of a host name"),
        (f"{'a' * 64}:80", "be part of a host name"),
        (f"{'a.' * 127}:80", "at most 253"),
        ("1.2.3:80", "not an IPv4 address"),
        ("1.2.3.256:80", "not an IPv4 address"),
        ("1.2.3.04:80", "not an IPv4 address"),
        ("2130706433:80", "not an IPv4 address"),
        ("0x7f000001:80", "not an IPv4 address"),
        ("[::g]:80", "not an IPv6 address"),
        ("[1::2::3]:80", "not an IPv6 address"),
        ("[fe80::1%]:80", "not an IPv6 zone"),
        ("[fe80::1%e%f]:80", "not an IPv6 zone"),
        ("[fe80::1%a b]:80", "not an IPv6 zone"),
        ("http://host:80", "URL"),
        ("bücher.example:80", "xn--"),
    ],
)
def test_an_invalid_address_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_address(text, field="SOURCE[1].sources[0]")
    message = str(caught.value)
    assert message.startswith("SOURCE[1].sources[0] = ")
    assert "[IPv6]:port" in message
    assert isinstance(caught.value, NetloaderError)


@pytest.mark.parametrize("value", [None, 7, True, 1.5, ["host:80"], {"host": "a"}, b"host:80"])
def test_an_address_is_text(value: object) -> None:
    with pytest.raises(ConfigError, match="an address is text"):
        parse_address(value)
    with pytest.raises(ConfigError, match="a host is text"):
        parse_host(value)


@pytest.mark.parametrize(
    ("text", "host"),
    [("0.0.0.0", "0.0.0.0"), ("::", "::"), ("[::]", "::"), ("Node-1", "node-1"), ("fe80::1%eth0", "fe80::1%eth0")],
)
def test_hosts_are_normalised(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize("text", ["", "[]", "[host]", "host:80", "10.0.0.256", "a b", "[::1", "::1]", "[10.0.0.7]"])
def test_an_invalid_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^LISTEN_HOST = ") as caught:
        parse_host(text, field="LISTEN_HOST")
    assert caught.value.field == "LISTEN_HOST"


@pytest.mark.parametrize("port", [0, -1, 65536, True, 1.0, "80", None])
def test_an_address_cannot_be_made_with_another_port(port: object) -> None:
    with pytest.raises(ConfigError, match=r"^port = "):
        Address("host", port)  # type: ignore[arg-type]


def test_an_address_cannot_be_changed() -> None:
    address = Address("host", 1)
    with pytest.raises(AttributeError):
        address.port = 2  # type: ignore[misc]


def test_wildcard_addresses_are_recognised() -> None:
    assert is_wildcard("0.0.0.0")
    assert is_wildcard("::")
    assert not is_wildcard("127.0.0.1")
    assert not is_wildcard("::1")
    assert not is_wildcard("localhost")
