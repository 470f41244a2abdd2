"""Helpers for the tests of two sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.protocol import State
from netloader.errors import (
    NetloaderError,
    RefusedError,
)
from tests.core.pair import Pair, Peer, Weights, client_terms, server_terms

SAME = Weights()


def go_on_until(pair: Pair, done: Callable[[], bool]) -> None:
    """Deliver and finish, one step at a time, until `done`."""
    for _ in range(200):
        for peer in pair.peers:
            if done():
                return
            pair.deliver(peer, 1 << 20)
            for task in peer.ready()[:1]:
                if done():
                    return
                peer.finish(task)
    raise AssertionError(f"never got there: {pair.states()}")


def in_state(peer: Peer, state: State) -> Callable[[], bool]:
    return lambda: peer.session.state is state


def until_transfer(**terms: Any) -> Pair:
    pair = Pair(client_terms(SAME, **terms), server_terms())
    go_on_until(pair, lambda: pair.states() == (State.TRANSFER, State.TRANSFER))
    return pair


def say(to: Peer, message: m.ClientMessage | m.ServerMessage) -> None:
    """Deliver everything that is in flight to `to`, and then `message`."""
    to.pair.deliver(to, 1 << 20)
    to.other.pipe += to.other.sealed(encode_frame(message))
    to.pair.deliver(to, 1 << 20)


def announced_by(weights: Weights) -> tuple[m.ServerMessage, ...]:
    """The messages of a server of `weights` when a client gets its turn."""
    known = weights.announcement()
    announce = m.Announce(
        manifest=known.manifest,
        block_bytes=known.plan.block_bytes,
        algorithm=known.algorithm,
        digests=known.digests,
        root=known.root,
        plan=known.plan.digest,
    )
    return m.Accepted(identity=known.identity), announce


def error_of(peer: Peer, kind: type[NetloaderError] = NetloaderError, says: str = "") -> NetloaderError:
    error = peer.session.error
    assert isinstance(error, kind), error
    assert says in str(error), error
    return error


def deadline_of(peer: Peer) -> float | None:
    return peer.deadline


def code_of(peer: Peer) -> str:
    error = peer.session.error
    assert isinstance(error, RefusedError), error
    return error.code


def steps(pair: Pair, count: int, piece: int) -> None:
    """Run `count` steps: deliver some bytes and finish a task, alternately for each side."""
    for step in range(count):
        peer = pair.peers[step // 2 % 2]
        if step % 2 == 0:
            pair.deliver(peer, piece)
        for task in peer.ready()[: step % 2]:
            peer.finish(task)
