"""Two sessions, one story at a time: how it should go, and what each kind of disagreement ends in."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.manifest import Manifest, TensorSpec, manifest_digest
from netloader.core.messages import Ability
from netloader.core.plan import expand
from netloader.core.protocol import State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import (
    ManifestError,
    NetloaderError,
    PeerLost,
    RemoteProtocolError,
    RootMismatch,
    TransferTimeout,
    TransportUnavailable,
)
from tests.core.pair import IDENTITY, Pair, Weights, client_terms, run, server_terms
from tests.core.stories import (
    SAME,
    announced_by,
    code_of,
    error_of,
    go_on_until,
    in_state,
    say,
    steps,
    until_transfer,
)

# --- how it should go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, b"secret"])
@pytest.mark.parametrize("blocks", [0, 1, 5])
@pytest.mark.parametrize("adopts", [False, True])
def test_a_pull_ends_done_on_both_sides_with_every_block(token: bytes | None, blocks: int, adopts: bool) -> None:
    weights = Weights(blocks)
    terms = client_terms(None if adopts else weights, token=token)
    pair = run(Pair(terms, server_terms(token=token), weights))
    assert pair.states() == (State.DONE, State.DONE)
    assert pair.ledger.complete
    assert pair.memory == {n: weights.content(n) for n in range(blocks)}
    assert pair.server.session.peer_software == "client"
    assert pair.client.session.transport == pair.server.session.transport == "memory"
    assert f.Note(f"the client reports complete: {blocks} blocks, 0 bytes from here") in pair.server.effects
    announces = [said for said in pair.server.said if isinstance(said, m.Announce)]
    assert [said.manifest is None for said in announces] == [not adopts], "an equal manifest does not travel"


def test_a_probe_learns_everything_and_opens_nothing() -> None:
    pair = run(Pair(client_terms(probe=True), server_terms()))
    assert pair.states() == (State.DONE, State.DONE)
    assert pair.client.session.announcement == pair.announcement
    assert not [x for p in pair.peers for x in p.effects if isinstance(x, f.AcceptChannel | f.ConnectChannel)]


def test_a_connection_that_ends_after_the_goodbye_is_not_a_failure() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.server, State.DONE))
    pair.deliver(pair.client, 1 << 20)
    assert pair.client.session.state is State.FINALIZE
    pair.deliver(pair.client, 1 << 20)  # nothing more to hear, and the server has closed
    assert pair.client.lost
    pair.end()
    assert pair.states() == (State.DONE, State.DONE)


def test_a_client_that_leaves_before_the_server_has_freed_its_end_is_not_a_failure() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.server, State.FINALIZE))
    assert [said for said in pair.server.said if isinstance(said, m.Goodbye)] == [m.Goodbye(code="done")]
    pair.server.feed(e.ConnectionLost("the client has closed"))
    assert pair.states()[0] == State.FINALIZE
    pair.server.feed(e.ChannelDown())
    assert pair.states()[0] == State.DONE


def test_a_server_that_said_goodbye_says_nothing_more() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.server, State.FINALIZE))
    before = len(pair.server.said)
    pair.server.feed(e.TimedOut())
    assert isinstance(pair.server.session.error, TransferTimeout)
    assert len(pair.server.said) == before


def test_a_connection_that_ends_before_the_goodbye_is_a_failure() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.client, State.FINALIZE))
    pair.cut()
    error_of(pair.client, PeerLost, "cut")
    error_of(pair.server, PeerLost, "cut")
    assert pair.ledger.complete


def test_blocks_that_the_server_no_longer_has_come_from_another() -> None:
    pair = until_transfer()
    go_on_until(pair, lambda: any(isinstance(t.effect, f.CheckBlocks) for t in pair.server.tasks))
    (task,) = [t for t in pair.server.tasks if isinstance(t.effect, f.CheckBlocks)]
    pair.server.finish(task, ok=False, subset=lambda number: number != 1)
    pair.end()
    assert pair.states() == (State.DONE, State.DONE)
    assert not pair.ledger.complete
    assert pair.ledger.verified_blocks == SAME.blocks - 1
    second = run(Pair(client_terms(SAME), server_terms(), ledger=pair.ledger, memory=pair.memory))
    assert [expand(w.ranges) for w in second.client.said if isinstance(w, m.Want)] == [(1,)]
    assert pair.ledger.complete


@pytest.mark.parametrize("piece", [1 << 20, 60])
def test_a_client_may_finish_at_any_step(piece: int) -> None:
    tried = set()
    for count in range(200):
        for when in ("before", "after hearing", "after working"):
            pair = Pair(client_terms(SAME), server_terms())
            steps(pair, count, piece)
            if when == "after hearing":
                pair.deliver(pair.server, 1 << 20)
            for task in pair.server.ready() if when == "after working" else ():
                pair.server.finish(task)
            state = pair.client.session.state
            if state in (State.PLAN, State.TRANSFER):
                tried.add(state)
                pair.client.feed(e.Finished("partial"))
                pair.end()
                assert pair.states() == (State.DONE, State.DONE), (count, when, pair.client.session.story)
    assert tried == {State.PLAN, State.TRANSFER}


@pytest.mark.parametrize("piece", [1 << 20, 60])
def test_losing_the_connection_at_any_step_ends_both_sides_and_corrupts_nothing(piece: int) -> None:
    for count in range(120):
        pair = Pair(client_terms(SAME), server_terms())
        steps(pair, count, piece)
        ended = [peer.ended for peer in pair.peers]
        pair.cut()
        pair.check()
        for peer, before in zip(pair.peers, ended, strict=True):
            assert peer.ended or peer.session.state is State.FINALIZE
            if peer.ended and not before:
                error_of(peer, PeerLost)
        pair.end()
        second = run(Pair(client_terms(SAME), server_terms(), ledger=pair.ledger, memory=pair.memory))
        assert second.ledger.complete
        assert second.states() == (State.DONE, State.DONE)


# --- who does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs"), [(b"one", b"other"), (b"one", None), (None, b"other"), (b"", b"other"), (b"one", b"")]
)
def test_a_wrong_or_missing_token_is_refused_on_both_sides(mine: bytes | None, theirs: bytes | None) -> None:
    pair = run(Pair(client_terms(SAME, token=mine), server_terms(token=theirs)))
    assert pair.states() == (State.FAILED, State.FAILED)
    assert (code_of(pair.server), code_of(pair.client)) == ("auth", "auth")
    assert "token" in str(pair.client.session.error)
    assert pair.client.session.announcement is None
    assert not [said for said in pair.server.said if isinstance(said, m.Accepted | m.Announce)]


def test_a_proof_cannot_be_reflected_or_replayed() -> None:
    pair = Pair(client_terms(SAME, token=b"t"), server_terms(token=b"t"))
    pair.deliver(pair.server, 1 << 20)
    (welcome,) = pair.server.said
    say(pair.server, m.Identify(proof=welcome.proof))
    assert code_of(pair.server) == "auth"


@pytest.mark.parametrize("speaks", [(9, 3), (3, 3)])
def test_a_client_of_an_incompatible_release_is_refused_by_version(speaks: tuple[int, int]) -> None:
    pair = run(Pair(client_terms(SAME), server_terms(), speaks=speaks))
    assert (code_of(pair.server), code_of(pair.client)) == ("version", "version")
    assert f"{speaks[1]} to {speaks[0]}" in str(pair.client.session.error)


@pytest.mark.parametrize(("speaks", "agreed"), [((9, 1), 2), ((9, 2), 2), ((2, 2), 2), ((1, 1), 1)])
def test_a_client_that_speaks_a_version_of_this_one_is_served_in_the_newest_that_both_speak(
    speaks: tuple[int, int], agreed: int
) -> None:
    pair = run(Pair(client_terms(SAME), server_terms(), speaks=speaks))
    assert pair.states() == (State.DONE, State.DONE)
    assert [w.protocol for w in pair.client.heard if isinstance(w, m.Welcome)] == [agreed]
    assert pair.server.session.protocol == pair.client.session.protocol == agreed


def test_a_server_that_answers_in_another_version_is_refused() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    say(pair.client, m.Welcome(protocol=3, nonce=bytes(16)))
    assert code_of(pair.client) == "version"
    pair.end()
    assert code_of(pair.server) == "version"


def test_identities_that_differ_are_refused_with_every_field_and_both_values() -> None:
    other = msgspec.structs.replace(IDENTITY, model="n", dtype="float16", tp_size=2)
    pair = run(Pair(client_terms(dataclasses.replace(SAME, identity=other)), server_terms()))
    assert (code_of(pair.server), code_of(pair.client)) == ("identity", "identity")
    for text in ("'m'", "'n'", "'bfloat16'", "'float16'", "tp_size", "set MODEL to one name"):
        assert text in str(pair.client.session.error)


@pytest.mark.parametrize(
    ("ours", "theirs", "hint"),
    [
        ({"layout": "checkpoint"}, {}, "an engine needs a source that is an engine"),
        ({"dtype": "float16"}, {}, "give both sides the same --dtype"),
        ({"tp_size": 2}, {}, "same model, dtype, quantisation"),
        ({"fingerprint": "f0"}, {"fingerprint": "a1"}, "use a source of the same ones"),
    ],
)
def test_the_hint_fits_the_difference(ours: dict[str, Any], theirs: dict[str, Any], hint: str) -> None:
    server = dataclasses.replace(SAME, identity=msgspec.structs.replace(IDENTITY, **ours))
    client = dataclasses.replace(SAME, identity=msgspec.structs.replace(IDENTITY, **theirs))
    pair = run(Pair(client_terms(client), server_terms(), server))
    assert hint in pair.client.session.error.hint if pair.client.session.error else False


def test_an_allowed_difference_is_logged() -> None:
    newer = dataclasses.replace(SAME, identity=msgspec.structs.replace(IDENTITY, engine="vllm 2"))
    older = dataclasses.replace(SAME, identity=msgspec.structs.replace(IDENTITY, engine="vllm 1"))
    pair = run(Pair(client_terms(older), server_terms(), newer))
    assert pair.states() == (State.DONE, State.DONE)
    assert any("engine: ours is 'vllm 1', theirs is 'vllm 2'" in note for note in pair.client.notes)


@pytest.mark.parametrize("field", [{"role": "draft"}, {"layout": "processed"}])
def test_a_client_without_identity_takes_only_what_it_asked_for(field: dict[str, Any]) -> None:
    pair = Pair(client_terms(layouts=("raw",)), server_terms())
    go_on_until(pair, in_state(pair.client, State.VALIDATE))
    say(pair.client, m.Accepted(identity=msgspec.structs.replace(IDENTITY, **field)))
    error_of(pair.client, RemoteProtocolError, "this client asked for 'target' in raw")


def test_tensors_that_differ_are_named_all_at_once() -> None:
    manifest = Manifest((TensorSpec("w", "int8", (7,)), TensorSpec("extra", "int8", ())))
    terms = client_terms(SAME, manifest=manifest, manifest_digest=manifest_digest(manifest))
    pair = run(Pair(terms, server_terms()))
    error = error_of(pair.client, ManifestError, "3 tensors differ")
    for text in ("extra: the server does not hold it", "w.tied: it is not expected", "dtype is 'int8' here"):
        assert text in str(error)
    assert code_of(pair.server) == "manifest"


def test_another_root_is_refused_by_name_by_the_side_that_finds_it_first() -> None:
    mine, theirs = Weights(), Weights(salt=b"fine-tuned ")
    first = run(Pair(client_terms(mine), server_terms(), mine))
    root = first.ledger.root
    pull: dict[str, Any] = {"ledger": first.ledger, "memory": first.memory}
    told = Pair(client_terms(mine, root=root, pinned_by="h:1"), server_terms(), theirs, **pull)
    run(told)
    assert (code_of(told.server), code_of(told.client)) == ("root", "root")
    for known in (root, theirs.announcement().root):
        assert known in str(told.client.session.error)
    # A server that keeps quiet about it is found out by the client, without asking the ledger.
    quiet = Pair(client_terms(mine, root=root, pinned_by="h:1"), server_terms(), theirs, **pull)
    go_on_until(quiet, lambda: any(isinstance(said, m.Identify) for said in quiet.client.said))
    quiet.client.other.pipe += b"".join(encode_frame(said) for said in announced_by(theirs))
    quiet.deliver(quiet.client, 1 << 20)
    error_of(quiet.client, RootMismatch, root)
    assert not [x for x in quiet.client.effects if isinstance(x, f.Pin)]
    # A client that does not say what it is pinned to is kept from it by its ledger.
    run(untold := Pair(client_terms(mine), server_terms(), theirs, **pull))
    error_of(untold.client, RootMismatch, root)
    assert code_of(untold.server) == "root"


def test_a_model_that_is_too_large_is_not_adopted() -> None:
    pair = run(Pair(client_terms(max_bytes=100), server_terms()))
    error_of(pair.client, ManifestError, "takes at most 100")


def test_no_common_transport() -> None:
    pair = run(Pair(client_terms(SAME, abilities=(Ability("pigeon"),)), server_terms()))
    error_of(pair.client, TransportUnavailable, "pigeon: the peer does not have it")
    assert code_of(pair.server) == "transport"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("root", "ab" * 32, "its own digests give"),
        ("plan", "ab" * 32, "different blocks"),
        ("digests", b"x" * 16, "1 digests at the server"),
        ("digests", b"x" * 64, "its own digests give"),
        ("algorithm", "other", "its own digests give"),
        ("block_bytes", 2048, "different blocks"),
        ("manifest", Manifest((TensorSpec("w", "odd", ()),)), "unknown dtype"),
    ],
)
def test_an_announcement_that_contradicts_itself_is_refused(field: str, value: Any, says: str) -> None:
    pair = Pair(client_terms(), server_terms())
    go_on_until(pair, lambda: any(isinstance(t.effect, f.TakeTurn) for t in pair.server.tasks))
    accepted, announce = announced_by(SAME)
    say(pair.client, accepted)
    say(pair.client, msgspec.structs.replace(announce, **{field: value}))
    error_of(pair.client, NetloaderError, says)
    assert not [x for x in pair.client.effects if isinstance(x, f.Pin)]


def test_no_manifest_for_a_client_that_has_none() -> None:
    pair = Pair(client_terms(), server_terms())
    go_on_until(pair, in_state(pair.client, State.VALIDATE))
    say(pair.client, m.Accepted(identity=IDENTITY))
    say(pair.client, m.Announce(block_bytes=1024, algorithm="", digests=b"", root="", plan=""))
    error_of(pair.client, RemoteProtocolError, "announced no manifest")
