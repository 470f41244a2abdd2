"""The documentation of the protocol says what the code does."""

from __future__ import annotations

import re
from typing import get_args

import msgspec
import pytest

from netloader.codecs.frames import CLIENT_FRAME_CAP, LARGE_FRAME, SERVER_FRAME_CAP
from netloader.core import messages as m
from netloader.core.options import Timings
from netloader.core.plan import (
    DEFAULT_BLOCK_BYTES,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MAX_SPANS,
    MIN_BLOCK_BYTES,
    block_bytes_for,
)
from netloader.core.protocol import TABLE, Side, State
from scripts import protocol_docs as docs

PAGE = docs.PROTOCOL.read_text()


def test_the_state_machine_page_is_current() -> None:
    assert docs.STATE_MACHINE.read_text() == docs.state_machine_page(), "run `make diagram`"


def test_the_tables_of_the_protocol_page_are_current() -> None:
    assert docs.protocol_page(PAGE) == PAGE, "run `make diagram`"


@pytest.mark.parametrize("side", list(Side))
def test_the_chart_and_the_table_show_every_row(side: Side) -> None:
    shown: set[tuple[State, str, State]] = set()
    for line in docs.state_table(side).splitlines()[2:]:
        name, stays, onward, fails = (cell.strip() for cell in line.strip("|").split("|"))
        state = State[name]
        shown |= {(state, event, state) for event in stays.split(", ")}
        shown |= {(state, event, State.FAILED) for event in fails.split(", ")}
        for part in onward.split("; "):
            events, after = part.split(" → ")
            shown |= {(state, event, State[after]) for event in events.split(", ")}
    rows = {(before, kind, after) for (whose, before, kind), (_, after) in TABLE.items() if whose is side}
    assert {(a, event.strip("*"), b) for a, event, b in shown} == {(a, kind.__name__, b) for a, kind, b in rows}
    assert all(event.startswith("*") == issubclass(getattr(m, event.strip("*"), int), m.Wire) for _, event, _ in shown)
    arrows = re.findall(r'(\w+) -\.?->\|"([^"]*)"\| (\w+)', docs.diagram(side))
    charted = {
        (before, event.removesuffix(" (peer)"), after)
        for start, events, after in arrows
        for event in events.split("<br/>")
        for before in ([s.name for s in State] if start == "working" else [start])
    }
    moving = {(a.name, kind.__name__, b.name) for a, kind, b in rows if a is not b}
    assert moving <= charted
    everywhere = {event.strip("*") for event in docs.everywhere(docs.moves(side))}
    assert {(a, event, b) for a, event, b in charted - moving if event not in everywhere} == set()


def test_every_message_field_and_code_is_in_the_page() -> None:
    for kind in {*get_args(m.ClientMessage), *get_args(m.ServerMessage)}:
        section = PAGE.split(f"### {kind.__name__}\n")[1].split("\n### ")[0]
        for name in kind.__struct_fields__:
            assert f"| `{name}` |" in section
    for code in get_args(m.RefusalCode):
        assert f"| `{code}` |" in PAGE


def test_the_numbers_in_the_prose_are_those_of_the_code() -> None:
    timings = Timings()
    for state, seconds in (
        ("LISTEN", timings.hello),
        ("VALIDATE", timings.validate),
        ("PLAN", timings.plan),
        ("TRANSFER", timings.stall),
        ("FINALIZE", timings.finalize),
    ):
        assert re.search(rf"^\| {state} \|[^|]*\| {seconds:g} s", PAGE, re.MULTILINE), state
    prose = " ".join(PAGE.split())
    assert (CLIENT_FRAME_CAP, SERVER_FRAME_CAP) == (256 << 10, 65 << 20)
    assert "from a client has a body of at most 256 KiB, an announcement at most 65 MiB" in prose
    assert LARGE_FRAME == 512 << 10
    assert "any other frame from a server at most 512 KiB" in prose
    assert (MIN_BLOCK_BYTES, MAX_BLOCK_BYTES, MAX_BLOCKS, DEFAULT_BLOCK_BYTES) == (1 << 10, 1 << 30, 1 << 20, 4 << 20)
    assert "between 1 KiB and 1 GiB, by default 4 MiB and more for models of over 256 GiB" in prose
    assert block_bytes_for(256 << 30) == DEFAULT_BLOCK_BYTES < block_bytes_for((256 << 30) + DEFAULT_BLOCK_BYTES)
    assert f"or holds {MAX_SPANS} of them" in prose
    assert f"The version is {m.PROTOCOL}; version {m.OLDEST} is still spoken." in prose
    assert f"Both send {m.NONCE_BYTES} random bytes" in prose


def test_every_type_has_a_description() -> None:
    with pytest.raises(SystemExit, match="no words"):
        docs.type_text(msgspec.inspect.AnyType())
