"""The address of a server, as the async and the sync side give it, is a key of the report's sources."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import netloader
from netloader import Address
from netloader.errors import ConfigError

WEIGHTS = {"w": torch.arange(100)}


async def test_the_address_of_an_async_server_finds_its_share() -> None:
    async with netloader.Server(WEIGHTS, host="127.0.0.1", transport="memory") as server:
        _, report = await netloader.pull_new(sources=[server.address], transport="memory")
    assert report.sources[server.address].blocks == report.blocks
    assert report.sources[str(server.address)].blocks == report.blocks
    assert server.address in report.sources


def test_the_address_of_a_sync_server_finds_its_share() -> None:
    with netloader.sync.serve(WEIGHTS, host="127.0.0.1") as server:
        _, report = netloader.sync.pull_new(sources=[server.address])
    assert report.sources[server.address].blocks == report.blocks


@pytest.mark.parametrize(
    ("host", "text"),
    [("10.0.0.7", "10.0.0.7:1"), ("FD00::7", "[fd00::7]:1"), ("[fe80::1%eth0]", "[fe80::1%eth0]:1"), ("H", "h:1")],
)
def test_an_address_is_its_text(host: str, text: str) -> None:
    address = Address(host, 1)
    assert address == text
    assert hash(address) == hash(text)
    assert f"{address}" == str(address) == text
    assert type(str(address)) is str
    assert Address(address.host, address.port) == address
    for same in (copy.copy(address), copy.deepcopy(address), pickle.loads(pickle.dumps(address))):
        assert type(same) is Address
        assert same == address


def test_an_address_has_a_host_and_a_port_and_cannot_be_changed() -> None:
    address = Address("[fe80::1%eth0]", 19374)
    assert (address.host, address.port) == ("fe80::1%eth0", 19374)
    assert repr(address) == "Address(host='fe80::1%eth0', port=19374)"
    with pytest.raises(AttributeError):
        address.port = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        address.note = "new"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="port = True"):
        Address("h", True)
    match address:
        case Address(host, port):
            assert (host, port) == ("fe80::1%eth0", 19374)


async def test_one_address_is_no_list_of_sources() -> None:
    with pytest.raises(ConfigError, match="a list of addresses"):
        await netloader.pull_new(sources=Address("10.0.0.7", 1))
