"""On a host with IPv6 only, and without a default route, a server announces its address and a client pulls from it."""

from __future__ import annotations

from tests.cases.networks import PAIR, run_in_network

PROGRAM = """\
weights = {"w": torch.arange(1000)}
with netloader.sync.serve(weights, transport="tcp") as server:
    tensors, _ = netloader.sync.pull_new(sources=[server.address], transport="tcp", timeout=60)
    print(server.address.host, torch.equal(tensors["w"], weights["w"]))
"""


def test_the_announced_address_works() -> None:
    lines, log = run_in_network([*PAIR, "-6 addr add fd77::1/64 dev v0 nodad"], PROGRAM)
    assert lines == ["fd77::1 True"]
    assert "to every host that can reach it" in log  # the only line: it listens on all interfaces without a token
    assert len(log.splitlines()) == 1
