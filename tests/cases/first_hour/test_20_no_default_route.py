"""A server that listens everywhere names an address that peers reach, also without a default route, or it warns."""

from __future__ import annotations

import pytest

from tests.cases.networks import PAIR, run_in_network

SERVE = """\
with netloader.sync.serve(host={host!r}, transport="tcp") as server:
    print(server.address.host)
"""
IPV4, IPV6 = "addr add 10.77.0.1/24 dev v0", "-6 addr add fd77::1/64 dev v0 nodad"
WARNING = "announced as {}, for this host only"


@pytest.mark.parametrize(
    ("addresses", "host", "announced"),
    [
        ([IPV4], None, "10.77.0.1"),
        ([IPV4, IPV6], "0.0.0.0", "10.77.0.1"),
        ([IPV4, IPV6], "::", "fd77::1"),
    ],
    ids=["all", "IPv4", "IPv6"],
)
def test_the_address_of_an_interface_is_announced(addresses: list[str], host: str | None, announced: str) -> None:
    lines, log = run_in_network([*PAIR, *addresses], SERVE.format(host=host))
    assert lines == [announced]
    assert log == ""


@pytest.mark.parametrize(("host", "loopback"), [(None, "127.0.0.1"), ("::", "::1")], ids=["all", "IPv6"])
def test_loopback_is_not_announced_in_silence(host: str | None, loopback: str) -> None:
    lines, log = run_in_network([*PAIR], SERVE.format(host=host))
    assert lines == [loopback]
    assert WARNING.format(loopback) in log
    assert log.startswith("netloader: the server listens on all addresses")


def test_a_server_that_is_bound_to_loopback_does_not_warn() -> None:
    lines, log = run_in_network(PAIR, SERVE.format(host="127.0.0.1"))
    assert (lines, log) == (["127.0.0.1"], "")
