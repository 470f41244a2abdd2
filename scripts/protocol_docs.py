"""Writes what the documentation says about the protocol from the code: `make diagram`.

docs/state-machine.md is made as a whole from the table of legal moves; in docs/protocol.md the parts between two marks
are made from the messages. A test fails when either is not what this would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import msgspec.inspect as mi

from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import Manifest, TensorSpec
from netloader.core.protocol import FINAL, TABLE, Side, State

DOCS = Path(__file__).parent.parent / "docs"
STATE_MACHINE, PROTOCOL = DOCS / "state-machine.md", DOCS / "protocol.md"

Moves = Mapping[tuple[State, State], tuple[str, ...]]

# --- the state machine ------------------------------------------------------------------------------------------------

_PAGE = """# The state machine

Made by `scripts/protocol_docs.py` from the table in `netloader/core/protocol/table.py`; do not edit.
What each state is for, and what crosses the wire, is in [protocol.md](protocol.md).

A session is one object on either side. It is given events and answers with effects; it does no I/O itself. Events in
*italics* are messages from the peer, the others come from this side's driver. Any pair of state and event that is not
listed below leads to FAILED, and any that is may do so when its handler finds a reason (a wrong proof, a difference, a
range that makes no sense). The two final states have no rows: a session that has ended ignores what comes late.
In the charts, dotted arrows lead to failure, and arrows that stay in a state are left out.
"""


def moves(side: Side) -> dict[tuple[State, State], tuple[str, ...]]:
    """The table of one side, with all events that lead from one state to another together."""
    found: dict[tuple[State, State], list[str]] = {}
    for (whose, before, kind), (_, after) in TABLE.items():
        if whose is side:
            name = f"*{kind.__name__}*" if issubclass(kind, m.Wire) else kind.__name__
            found.setdefault((before, after), []).append(name)
    order = list(State)
    return {
        pair: tuple(sorted(names, key=lambda name: name.strip("*")))
        for pair, names in sorted(found.items(), key=lambda item: [order.index(state) for state in item[0]])
    }


def everywhere(table: Moves) -> tuple[str, ...]:
    """Events that lead to FAILED from every working state but perhaps the last."""
    working = [state for state in State if state not in FINAL]
    failing = [set(table.get((state, State.FAILED), ())) for state in working[:-1]]
    return tuple(sorted(set.intersection(*failing), key=lambda name: name.strip("*")))


def diagram(side: Side) -> str:
    """One side as a Mermaid flow chart: what moves a session on, and what ends it."""
    table = moves(side)
    common = everywhere(table)
    lines = ["```mermaid", "flowchart TD", '    subgraph working["working states"]']
    arrows: list[str] = []
    for (before, after), names in table.items():
        own = tuple(name for name in names if after is not State.FAILED or name not in common)
        if not own or before is after:
            continue
        arrow = f'{before.name} {"-.->" if after is State.FAILED else "-->"}|"{_label(own)}"| {after.name}'
        (arrows if after in FINAL else lines).append(f"    {'' if after in FINAL else '    '}{arrow}")
    lines += ["    end", *arrows, f'    working -.->|"{_label(common)}"| FAILED']
    lines += ["    DONE([DONE])", "    FAILED([FAILED])", "```"]
    return "\n".join(lines)


def _label(names: Iterable[str]) -> str:
    # Italics are not for charts; slashes mark what the peer said.
    return "<br/>".join(f"{name.strip('*')} (peer)" if name.startswith("*") else name for name in names)


def state_table(side: Side) -> str:
    """Every row of one side."""
    table = moves(side)
    lines = ["| state | stays on | moves on | fails on |", "| --- | --- | --- | --- |"]
    for state in State:
        if state in FINAL:
            continue
        onward = [
            f"{', '.join(names)} → {after.name}"
            for (before, after), names in table.items()
            if before is state and after is not state and after is not State.FAILED
        ]
        cells = [
            state.name,
            ", ".join(table.get((state, state), ())),
            "; ".join(onward),
            ", ".join(table.get((state, State.FAILED), ())),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def state_machine_page() -> str:
    """docs/state-machine.md."""
    parts = [_PAGE]
    for side in Side:
        parts += [f"\n## {side.value.capitalize()}\n", diagram(side), "", state_table(side)]
    return "\n".join(parts) + "\n"


# --- the messages -----------------------------------------------------------------------------------------------------


def messages_part() -> str:
    """Every message, field by field."""
    client, server = get_args(m.ClientMessage), get_args(m.ServerMessage)
    parts = []
    for kind in dict.fromkeys((*_turn_by_turn(client, server), *client, *server)):
        by = " and ".join(name for name, kinds in (("client", client), ("server", server)) if kind in kinds)
        parts.append(f"### {kind.__name__}\n\nSent by the {by}. {_summary(kind)}\n\n{fields_table(kind)}")
    return "\n\n".join(parts)


def _turn_by_turn(client: tuple[type, ...], server: tuple[type, ...]) -> list[type]:
    """Messages in the order in which their classes are written, which is that of a conversation."""
    kinds = {*client, *server}
    return [kind for kind in vars(m).values() if isinstance(kind, type) and kind in kinds]


def structs_part() -> str:
    """What messages are made of."""
    parts = []
    for kind in (m.Ability, ModelIdentity, Manifest, TensorSpec):
        as_array = kind.__struct_config__.array_like
        form = " On the wire an array of its fields in this order, without their names." if as_array else ""
        parts.append(f"### {kind.__name__}\n\n{_summary(kind)}{form}\n\n{fields_table(kind)}")
    return "\n\n".join(parts)


def codes_part() -> str:
    """The refusal codes; what each means stands beside it in the source."""
    source = inspect.getsource(m)
    lines = ["| code | meaning |", "| --- | --- |"]
    for code in get_args(m.RefusalCode):
        found = re.search(rf'^    "{code}",  # (.+)$', source, re.MULTILINE)
        if found is None:
            raise SystemExit(f"netloader/core/messages.py says nothing about the refusal code {code!r}")
        lines.append(f"| `{code}` | {found[1]} |")
    return "\n".join(lines)


def fields_table(kind: type) -> str:
    """One row for each field of a struct: type, default, meaning."""
    info = mi.type_info(kind)
    if not isinstance(info, mi.StructType):
        raise SystemExit(f"{kind.__name__} is no struct")
    meanings = _attributes(kind)
    if not info.fields:
        return "It has no fields."
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in info.fields:
        if field.name not in meanings and len(info.fields) > 1:
            raise SystemExit(f"{kind.__name__} does not say what {field.name} is for")
        meaning = meanings.get(field.name, "")
        lines.append(f"| `{field.encode_name}` | {type_text(field.type)} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _default(field: mi.Field) -> str:
    if field.required:
        return "required"
    if field.default is None:
        return "none"
    if field.default in ("", b"", ()) or field.default_factory is not msgspec.NODEFAULT:
        return "empty"
    return f"`{str(field.default).lower()}`"


def type_text(kind: mi.Type) -> str:
    """A type with its limits, in words."""
    match kind:
        case mi.StrType(min_length=least, max_length=most, pattern=pattern):
            return _limited("text" if pattern is None else "hex digits", least, most)
        case mi.BytesType(min_length=least, max_length=most):
            return _limited("bytes", least, most)
        case mi.BoolType():
            return "boolean"
        case mi.IntType(ge=low, le=high) | mi.FloatType(ge=low, le=high):
            return _between("integer" if isinstance(kind, mi.IntType) else "number", low, high)
        case mi.VarTupleType(item_type=item, max_length=most):
            return f"list of ({type_text(item)})" + ("" if most is None else f", at most {_round(most)}")
        case mi.TupleType(item_types=items):
            return "; ".join(type_text(item) for item in items)
        case mi.DictType(key_type=key, value_type=value):
            return f"map of ({type_text(key)}) to ({type_text(value)})"
        case mi.LiteralType(values=values):
            return _choice(values)
        case mi.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case mi.UnionType(types=types):
            named = [type_text(one) for one in types if not isinstance(one, mi.NoneType)]
            return " or ".join(named) + (" or none" if len(named) < len(types) else "")
        case _:
            raise SystemExit(f"no words for {kind}")


def _choice(values: Sequence[object]) -> str:
    if set(values) == set(get_args(m.RefusalCode)):
        return "a [refusal code](#refusal-codes)"
    return ("one of " if len(values) > 1 else "") + ", ".join(f"`{value}`" for value in values)


def _limited(what: str, least: int | None, most: int | None) -> str:
    if most is None:
        return what
    if least == most:
        return f"{what}, exactly {most}"
    return f"{what}, {least} to {most}" if least else f"{what}, at most {most}"


def _between(what: str, low: float | None, high: float | None) -> str:
    if low is None:
        return what
    return f"{what} from {_round(low)}" + ("" if high is None else f" to {_round(high)}")


def _round(number: float) -> str:
    whole = int(number)
    power = whole.bit_length() - 1
    return f"2^{power}" if whole >= 1 << 16 and whole == 1 << power else str(whole)


# --- docstrings -------------------------------------------------------------------------------------------------------


def _summary(kind: type) -> str:
    text = (inspect.getdoc(kind) or "").split("\n\nAttributes:")[0]
    text = _words(re.sub(r"^(Client|Server|Either side): ", "", text))
    return text[0].upper() + text[1:]


def _attributes(kind: type) -> dict[str, str]:
    """What the docstring says about each field."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", listed):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            meanings[name] = _words(text)
    return meanings


def _words(text: str) -> str:
    """A docstring's text on one line, with its references and literals as Markdown writes them."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")


# --- writing ----------------------------------------------------------------------------------------------------------


def protocol_page(page: str) -> str:
    """docs/protocol.md with the parts between marks made anew."""
    for name, make in (("messages", messages_part), ("structs", structs_part), ("codes", codes_part)):
        begin, end = f"<!-- made from the code: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"docs/protocol.md has no part between {begin} and {end}")
        page = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return page


def main() -> None:
    """Write both pages."""
    STATE_MACHINE.write_text(state_machine_page())
    PROTOCOL.write_text(protocol_page(PROTOCOL.read_text()))
    print(f"wrote {STATE_MACHINE} and parts of {PROTOCOL}")


if __name__ == "__main__":
    main()
