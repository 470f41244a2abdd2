"""VALIDATE: the server compares identities, and the client waits for its turn."""

from __future__ import annotations

from collections.abc import Sequence

from netloader.core import messages as m
from netloader.core.identity import OF_QUANTIZATION, Difference, ModelIdentity, Role, Severity, differences
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context, Refuse
from netloader.core.protocol.events import Held, NotHeld, Queued, TurnTaken
from netloader.errors import LocalProtocolError, RefusedError, RemoteProtocolError

__all__ = [
    "client_accepted",
    "client_waiting",
    "server_held",
    "server_identify",
    "server_not_held",
    "server_queued",
    "server_turn",
]


def _explain(found: Sequence[Difference], ours: str, theirs: str, role: Role) -> tuple[str, str]:
    """Message and hint for identities that differ. `ours` and `theirs` name the sides of each difference."""
    text = "the identities differ: " + "; ".join(
        f"{d.field} is {d.ours!r} at the {ours} and {d.theirs!r} at the {theirs}" for d in found
    )
    origins = next(((d.our_origin, d.their_origin) for d in found if d.our_origin), None)
    if origins is not None:
        text += f"; the {ours} has its name from its {origins[0]}, the {theirs} from its {origins[1]}"
    fields = {d.field for d in found}
    if "model" in fields and "fingerprint" not in fields:
        if role == "draft":
            return text, "if both are the same model, set DRAFT_MODEL to one name on both sides"
        return text, (
            "if both are the same model, set MODEL to one name on both sides, or leave it out and set EXPECT_ROOT on "
            "the client to the root that the source logs"
        )
    if "layout" in fields and any("checkpoint" in (d.ours, d.theirs) for d in found):
        return text, "a checkpoint server feeds `netloader pull`; an engine needs a source that is an engine"
    if "dtype" in fields:
        # Without a dtype in config.json an engine takes that of the weight files, which a client may not have.
        return text, "give both sides the same --dtype, the same model and parallel sizes"
    if all(field == "quantization_config" or field.startswith(OF_QUANTIZATION) for field in fields):
        return (
            text,
            "give both sides the same arguments, config.json and other files that say how the weights are quantised",
        )
    settings = sorted(fields - set(ModelIdentity.__struct_fields__))
    if settings:
        return text, (
            "start both sides with the same arguments, files that they name, environment variables and config.json, as "
            "far as they decide " + ", ".join(settings)
        )
    if fields <= {"model", "fingerprint"}:
        return (
            text,
            "the weight files of both sides differ (another fine-tune, or revision): use a source of the same ones",
        )
    return text, "start both sides with the same model, dtype, quantisation and parallel sizes"


def server_identify(ctx: Context, event: m.Identify) -> Sequence[f.Effect]:
    """The client said what it wants: look it up. With a token, only an authentic frame comes here."""
    if ctx.identify is not None:
        raise RemoteProtocolError("the client sent Identify twice")
    ctx.identify, ctx.probing = event, event.probe
    role = event.role if event.identity is None else event.identity.role
    layouts = event.layouts if event.identity is None else (event.identity.layout,)
    # The client waits for the server from here on, so it has no deadline.
    return [f.LookUp(role, layouts), f.SetTimer(None)]


def _identified(ctx: Context) -> m.Identify:
    """The client's Identify message. It is set only after the client proved that it knows the token."""
    if ctx.identify is None:
        raise LocalProtocolError("the client has not sent Identify")
    return ctx.identify


def server_held(ctx: Context, event: Held) -> Sequence[f.Effect]:
    """The holding is here: compare identities before the client enters the queue."""
    identify, ours = _identified(ctx), event.announcement.identity
    if ctx.announcement is not None:
        raise LocalProtocolError("Held came twice")
    ctx.announcement = event.announcement
    if identify.identity is not None:
        same_root = bool(identify.root) and identify.root == event.announcement.root
        every = differences(ours, identify.identity, same_root=same_root)
        found = [d for d in every if d.severity is Severity.REFUSE]
        if found and not identify.probe:
            text, hint = _explain(found, "server", "client", ours.role)
            raise Refuse("identity", text, hint=hint)
        ctx.peer_identity = identify.identity
    if identify.root and identify.root != event.announcement.root:
        raise Refuse(
            "root",
            f"this server holds root {event.announcement.root}, the client is pinned to root {identify.root}",
            hint="the two hold different weights of equal shape; give sources of one checkpoint only",
        )
    return [f.TakeTurn()]


def server_not_held(ctx: Context, event: NotHeld) -> Sequence[f.Effect]:
    """The holding is not here (not at all, not yet, or no longer): refuse."""
    raise Refuse(event.code, event.reason, hint=event.hint, retry_after=event.retry_after, sources=event.sources)


def server_queued(ctx: Context, event: Queued) -> Sequence[f.Effect]:
    """Other clients come first: tell the client, so that it knows that this server is alive."""
    _identified(ctx)
    return [f.Send(m.Waiting(reason=m.wire_text(event.reason), position=event.position))]


def server_turn(ctx: Context, event: TurnTaken) -> Sequence[f.Effect]:
    """The client got its turn: send it everything that it needs to derive the plan."""
    known = ctx.known()
    ctx.partial = event.partial
    same = _identified(ctx).manifest == known.manifest_digest
    announce = m.Announce(
        manifest=None if same else known.manifest,
        block_bytes=known.plan.block_bytes,
        algorithm=known.algorithm,
        digests=known.digests,
        root=known.root,
        plan=known.plan.digest,
        node=event.node,
        chain=event.chain,
        partial=event.partial,
        shared=event.shared,
        metadata=None if known.metadata is None else dict(known.metadata),
    )
    return [f.Send(m.Accepted(identity=known.identity)), f.Send(announce), f.SetTimer(ctx.timings().plan)]


def client_waiting(ctx: Context, event: m.Waiting) -> Sequence[f.Effect]:
    """The server is alive, but this client has to wait for its turn."""
    note = f.Note(f"waiting for a turn: {event.reason}")
    return [note, f.NoteQueued(event.position, event.reason), f.SetTimer(ctx.timings().validate)]


def client_accepted(ctx: Context, event: m.Accepted) -> Sequence[f.Effect]:
    """The server says that the identities match: check this on this side too."""
    ctx.peer_identity = event.identity
    notes: list[f.Effect] = []
    terms, layouts = ctx.client, ctx.client.options.layouts
    if terms.identity is None and (event.identity.role != terms.role or event.identity.layout not in layouts):
        raise RemoteProtocolError(
            f"the server gives role {event.identity.role!r} in layout {event.identity.layout!r}, "
            f"this client asked for {terms.role!r} in {' or '.join(layouts) or 'no layout'}"
        )
    if terms.identity is not None and not ctx.probing:
        # With a root in the terms, an announcement with another root is refused (see `announcement`).
        found = differences(terms.identity, event.identity, same_root=bool(terms.root))
        refused = [d for d in found if d.severity is Severity.REFUSE]
        if refused:
            text, hint = _explain(refused, "client", "server", terms.identity.role)
            raise RefusedError("identity", text, hint=hint)
        notes = [f.Note(f"the source differs, which is allowed: {d}") for d in found]
    return [*notes, f.SetTimer(ctx.timings().plan)]
