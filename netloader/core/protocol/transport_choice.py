"""Choosing a transport: a pure function of the transports that both sides listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netloader.core.messages import Ability
from netloader.errors import TransportUnavailable

__all__ = ["choose_transport", "why_not_chosen"]


def choose_transport(ours: Sequence[Ability], theirs: Sequence[Ability]) -> tuple[Ability, Ability]:
    """Choose the first transport in this side's preference that both sides have and whose facts match.

    A fact that both sides state (which host, which user) has to be equal. A fact of one side only is not compared.

    Args:
        ours: Transports of this side, preferred first.
        theirs: Transports of the peer, in any order.

    Returns:
        This side's entry and the peer's entry of the same name.

    Raises:
        TransportUnavailable: There is none. The message says why for each transport, the hint which ones to configure.
    """
    offered: dict[str, Ability] = {}
    for ability in theirs:
        offered.setdefault(ability.name, ability)
    reasons = []
    worth_naming = {*offered, *(ability.name for ability in ours)}
    for ability in ours:
        other = offered.get(ability.name)
        if other is None:
            reasons.append(f"{ability.name}: the peer does not have it")
            continue
        apart = _apart(ability, other)
        if not apart:
            return ability, other
        reasons.append(f"{ability.name}: {apart}")
        worth_naming.discard(ability.name)
    if not ours:
        reasons.append("this side has none for its device")
    # Some transports are used only where they are configured by name, so the peer may have more than it listed.
    names = " or ".join(sorted(worth_naming))
    remedy = f"name one on both sides: TRANSPORT {names}" if names else "allow another one on both sides"
    raise TransportUnavailable(
        "no transport can connect the two sides: " + "; ".join(reasons),
        hint=f"the peer has {', '.join(sorted(offered)) or 'none'}; {remedy}",
    )


def why_not_chosen(
    chosen: str, ours: Sequence[Ability], theirs: Sequence[Ability], unavailable: Mapping[str, str]
) -> list[str]:
    """Why other transports could not be chosen, for the log. Those that are only less preferred are left out.

    Args:
        chosen: The chosen transport.
        ours: Transports of this side, preferred first.
        theirs: Transports of the peer.
        unavailable: Why other transports cannot run on this side, by name.
    """
    offered = {ability.name: ability for ability in reversed(theirs)}
    reasons = []
    for ability in ours:
        other = offered.pop(ability.name, None)
        if ability.name == chosen:
            continue
        why = "the peer does not have it" if other is None else _apart(ability, other)
        if why:  # otherwise it would have worked too, and is only less preferred
            reasons.append(f"{ability.name}: {why}")
    reasons += [f"{name}: {why}" for name, why in unavailable.items() if name != chosen]
    return reasons + [f"{name}: not used on this side" for name in offered if name not in unavailable]


def _apart(ours: Ability, theirs: Ability) -> str:
    """In which facts two sides differ, as text; empty when in none."""
    apart = [key for key, value in ours.facts.items() if theirs.facts.get(key, value) != value]
    return f"the two sides differ in {', '.join(apart)}" if apart else ""
