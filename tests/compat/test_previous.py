"""The release before and this one serve each other, over each transport: plainly, as relays, and where one dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.compat import agents
from tests.compat.agents import ROOT, Agent, Release

TRANSPORTS = ("tcp", "shm", "gloo")
HELD_BLOCK = 1
"""The block after which a source sends nothing more; two of 1 MiB are there then."""

Pair = tuple[Release, Release]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    tree = agents.unpack_previous(tmp_path_factory.mktemp("previous"))
    with ExitStack() as stack:
        yield Release("previous", tree, stack), Release("present", ROOT, stack)


@pytest.fixture(params=["the previous one first", "the present one first"])
def pair(request: pytest.FixtureRequest, releases: Pair) -> Iterator[Pair]:
    yield releases if request.param == "the previous one first" else (releases[1], releases[0])
    for release in releases:
        release.stop()


def outcome(one: Agent, name: str, transport: str) -> dict[str, int]:
    """The end of a pull that brought the right bytes: who gave how many blocks."""
    result = one.ask("result", name=name)
    assert result.get("digest") == one.greeting["digest"], result
    assert result["transports"] == [transport]
    blocks: dict[str, int] = result["blocks"]
    return {source: count for source, count in blocks.items() if count}


def pull(transport: str, token: str | None, name: str, *sources: str, relay: bool = False) -> dict[str, Any]:
    return {"name": name, "sources": sources, "token": token, "transport_name": transport, "relay": relay}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pull(pair: Pair, transport: str) -> None:
    server, client = (release.agent("first") for release in pair)
    address = server.ask("serve", name="plain", transport=transport, token=None)["address"]
    client.ask("pull", **pull(transport, None, "plain", address))
    assert outcome(client, "plain", transport) == {address: 7}


UPGRADE = "upgrade the {} first, or run both without a token on a network that you trust"
REFUSED = {
    ("previous", "both"): (
        "this client has a token, which needs protocol 2; the server speaks only protocol 1",
        UPGRADE.format("server"),
    ),
    ("present", "both"): (
        "this server has a token, which needs protocol 2; the client speaks only protocol 1",
        UPGRADE.format("client"),
    ),
    ("previous", "server"): ("the server has a token, and this client has none", "configure the same token"),
    ("present", "server"): (
        "this server has a token, which needs protocol 2; the client speaks only protocol 1",
        UPGRADE.format("client"),
    ),
    ("previous", "client"): ("the server has no token, and this client has one", "configure the same token"),
    ("present", "client"): ("the server has no token", "configure the same token"),
}
"""By the release of the server, and who has a token: what the client's error says, and its hint."""


@pytest.mark.parametrize("has_token", ["both", "server", "client"])
def test_a_token_is_refused_by_name_between_protocols_1_and_2(pair: Pair, has_token: str) -> None:
    server, client = (release.agent("first") for release in pair)
    served, pulled = (("one of the secrets" if has_token in ("both", side) else None) for side in ("server", "client"))
    address = server.ask("serve", name="secret", transport="tcp", token=served)["address"]
    client.ask("pull", **pull("tcp", pulled, "secret", address))
    failed = client.ask("result", name="secret")["failed"]
    for text in REFUSED[pair[0].name, has_token]:
        assert text in failed


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_relay_a_redirection_and_a_source_that_dies(pair: Pair, transport: str) -> None:
    one, other = pair
    token = None
    with agents.agent(one.tree) as dying:
        first = dying.ask("serve", name="first", transport=transport, token=token, hold=HELD_BLOCK)["address"]
        second = one.agent("second").ask("serve", name="second", transport=transport, token=token)["address"]
        second_other = other.agent("second").ask("serve", name="second", transport=transport, token=token)["address"]

        # `other` pulls from `one` and passes on; the next client is sent from `one` to `other`, which waits itself.
        relay = other.agent("first")
        passed_on = relay.ask("pull", **pull(transport, token, "relay", first, second_other, relay=True))["address"]
        assert relay.ask("progress", name="relay", nbytes=1 << 20)["verified"] < 5 << 20
        client = one.agent("first")
        client.ask("pull", **pull(transport, token, "client", first, second))
        assert client.ask("progress", name="client", nbytes=1 << 20)["verified"] < 5 << 20

        dying.kill()
    blocks = outcome(relay, "relay", transport)
    assert blocks.keys() == {first, second_other}
    assert outcome(client, "client", transport) == {passed_on: 7}


# --- that these tests test it ---------------------------------------------------------------------------------------


def test_a_history_that_lacks_the_release_before_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agents, "PREVIOUS", "0" * 40)
    with pytest.raises(pytest.fail.Exception, match="the history has no 0000"):
        agents.unpack_previous(tmp_path)


def test_a_tree_without_history_skips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agents, "ROOT", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="without its history"):
        agents.unpack_previous(tmp_path)


def test_another_netloader_than_that_of_the_tree_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="that was to run the netloader of"), agents.agent(tmp_path):
        pass
