"""The key under which servers of a model are published, and clients look for them. Pure.

The key covers what must be equal on both sides and is known before a model is built. Servers with another key would be
refused for certain. Servers with the same key may still be refused: validation decides, by the whole identity.
"""

from __future__ import annotations

import hashlib

import msgspec

from netloader.core.identity import ModelIdentity, known_before_loading

__all__ = ["KEY_VERSION", "key_of"]

KEY_VERSION = 1
"""Goes up when other fields are covered, because releases that cover different fields can't find each other."""

_KEY_BYTES = 20


def key_of(identity: ModelIdentity) -> str:
    """The key of an identity: the same text in each process and on each host, for one :data:`KEY_VERSION`.

    Names, the revision and the fingerprint are not covered: one side may know them and the other not. Nor is what only
    a built model or its files show (placement of experts, tied embeddings, load state). The layouts of an engine, raw
    and processed, have one key, because a client asks for both.
    """
    body = msgspec.json.encode([KEY_VERSION, sorted(known_before_loading(identity).items())])
    return f"{KEY_VERSION}-{hashlib.blake2b(body, digest_size=_KEY_BYTES).hexdigest()}"
