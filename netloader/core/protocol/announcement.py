"""Checks a server's announcement. Thread-safe, because a large manifest is checked outside of the event loop."""

from __future__ import annotations

from netloader.core.identity import ModelIdentity
from netloader.core.manifest import DIGEST_BYTES, Manifest, check_sizes, compare, compute_root, manifest_digest
from netloader.core.messages import MAX_METADATA_BYTES, metadata_bytes
from netloader.core.plan import make_plan
from netloader.core.protocol.effects import Examine
from netloader.core.protocol.events import Announcement
from netloader.errors import ManifestError, RemoteProtocolError, RootMismatch

__all__ = ["examine"]


def examine(question: Examine) -> Announcement:
    """Check an announcement against what this client is about to fill, and derive the blocks.

    Raises:
        ManifestError: The tensors are not those that this client fills, can't be sent, or exceed its limit.
        RemoteProtocolError: The announcement contradicts itself.
        RootMismatch: The weights are not those that the pull is pinned to.
    """
    event, terms = question.announce, question.terms
    manifest, digest = _manifest(question)
    least = manifest.nbytes // event.block_bytes
    if not least <= len(event.digests) // DIGEST_BYTES <= least + len(manifest.tensors) + 1:  # before the plan is made
        raise RemoteProtocolError(
            f"both sides derived different blocks (plan of at least {least} blocks here, "
            f"{len(event.digests) // DIGEST_BYTES} digests at the server)",
            hint="run the same netloader release on both sides",
        )
    plan = make_plan(manifest, event.block_bytes)
    if plan.digest != event.plan:
        raise RemoteProtocolError(
            f"both sides derived different blocks (plan {plan.digest[:16]} here, {event.plan[:16]} at the server)",
            hint="run the same netloader release on both sides",
        )
    if len(event.digests) != DIGEST_BYTES * len(plan.blocks):
        raise RemoteProtocolError(f"{len(plan.blocks)} blocks came with {len(event.digests)} bytes of digests")
    root = compute_root(manifest, event.block_bytes, event.algorithm, event.digests, known_digest=digest)
    if root != event.root:
        raise RemoteProtocolError(f"the server announced root {event.root}, its own digests give {root}")
    if terms.root and root != terms.root:
        raise RootMismatch(terms.root, root, terms.pinned_by)
    if event.metadata is not None and metadata_bytes(event.metadata) > MAX_METADATA_BYTES:
        raise RemoteProtocolError(
            f"the server announced {metadata_bytes(event.metadata)} bytes of metadata, allowed are {MAX_METADATA_BYTES}"
        )
    identity = question.identity if question.identity is not None else ModelIdentity()
    return Announcement(identity, manifest, digest, plan, event.algorithm, event.digests, root, event.metadata)


def _manifest(question: Examine) -> tuple[Manifest, str]:
    """The manifest to pull with and its digest, checked against what this side is about to fill."""
    announced, terms = question.announce.manifest, question.terms
    if announced is None:
        if terms.manifest is None:
            raise RemoteProtocolError("the server announced no manifest, and this client has none of its own")
        return terms.manifest, terms.manifest_digest
    if terms.manifest is not None and not question.probing:
        check_sizes(announced.tensors)
        found = compare(terms.manifest, announced)
        if found:
            one = "1 tensor differs from what the server holds"
            raise ManifestError(
                one if len(found) == 1 else f"{len(found)} tensors differ from what the server holds",
                problems=[str(mismatch) for mismatch in found],
                hint="both sides have to build the model alike: same dtype, quantisation, parallel sizes and release",
            )
        return terms.manifest, terms.manifest_digest or manifest_digest(terms.manifest)
    announced.check()
    if announced.nbytes > terms.options.max_bytes:
        raise ManifestError(
            f"the server holds {announced.nbytes} bytes, this client takes at most {terms.options.max_bytes}",
            hint="raise the limit if that is expected",
        )
    return announced, manifest_digest(announced)
