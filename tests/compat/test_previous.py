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


@pytest.mark.parametrize("token", [None, "one of the secrets"], ids=["open", "token"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pull(pair: Pair, transport: str, token: str | None) -> None:
    server, client = (release.agent("first") for release in pair)
    address = server.ask("serve", name="plain", transport=transport, token=token)["address"]
    client.ask("pull", **pull(transport, token, "plain", address))
    assert outcome(client, "plain", transport) == {address: 7}


def test_another_token_is_refused(pair: Pair) -> None:
    server, client = (release.agent("first") for release in pair)
    address = server.ask("serve", name="secret", transport="tcp", token="one of the secrets")["address"]
    client.ask("pull", **pull("tcp", "another of the secrets", "secret", address))
    assert "could not prove that it knows the token" in client.ask("result", name="secret")["failed"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_relay_a_redirection_and_a_source_that_dies(pair: Pair, transport: str) -> None:
    one, other = pair
    token = "one of the secrets" if transport == "shm" else None
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
