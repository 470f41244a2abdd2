"""The key under which servers of a model are published, and clients look for them. Pure.

The key covers what must be equal on both sides and is known before a model is built. Servers with another key would be
refused for certain. Servers with the same key may still be refused: validation decides, by the whole identity.
"""

from __future__ import annotations

import hashlib
import json

import msgspec

from netloader.core.identity import ModelIdentity, known_before_loading

__all__ = ["KEY_VERSION", "key_of", "rank_of"]

KEY_VERSION = 1
"""Goes up when other fields are covered, because releases that cover different fields can't find each other."""

_KEY_BYTES = 20


def key_of(identity: ModelIdentity) -> str:
    """The key of an identity: the same text in each process and on each host, for one :data:`KEY_VERSION`.

    Names, the revision and the fingerprint are not covered: one side may know them and the other not. Nor is what only
    a built model or its files show (placement of experts, tied embeddings, load state). The layouts of an engine, raw
    and processed, have one key, because a client asks for both.
    """
    covered = [KEY_VERSION, sorted(known_before_loading(identity).items())]
    try:
        body = msgspec.json.encode(covered)
    except UnicodeEncodeError:  # half of a character. Such an identity can't be sent, but has a key as any other
        body = json.dumps(covered).encode()
    return f"{KEY_VERSION}-{hashlib.blake2b(body, digest_size=_KEY_BYTES).hexdigest()}"


def rank_of(identity: ModelIdentity, rank: int | None = None) -> int:
    """The rank under which a share of a model is published and looked for: its place in one engine.

    Ranks of data-parallel replicas are numbered one after the other, and the replicas hold equal shares. So a rank
    finds those of every replica. Only where experts are spread over the replicas, their shares differ.

    Args:
        identity: The identity of the share.
        rank: Its rank as the engine numbers it; None if there is no engine.
    """
    if rank is not None and identity.ep_size > identity.tp_size:
        return rank
    return identity.pp_rank * identity.tp_size + identity.tp_rank
