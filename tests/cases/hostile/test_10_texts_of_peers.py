"""What a peer says can neither control a terminal nor forge a line of a log or of a command, nor flood either."""

from __future__ import annotations

import argparse
import io
import logging
import time
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netloader import api
from netloader.cli import console
from netloader.cli import probe as probe_command
from netloader.client.probe import Probe
from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import TensorSpec
from netloader.core.options import PullOptions
from netloader.core.protocol import ClientTerms, ServerTerms, Session, Side
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import AttemptFailed, NetloaderError, NoSourceLeft, RefusedError, legible
from netloader.session.notes import SessionNotes
from tests.core.pull_world import announcement
from tests.drivers import kit
from tests.drivers.test_completion import HUB

ATTACKS = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1H",
    "ok\nmatches: yes, a pull gives these exact weights",
    "a\rb",
    "\x9b31m",
    "\u202egnp.exe",
    "a\u200bb\u2028c\u2029d",
    "\U000e0041",
    "\ud800",
)
texts = st.sampled_from(ATTACKS) | st.text(max_size=40) | st.lists(st.sampled_from(ATTACKS), max_size=4).map("".join)


def assert_harmless(text: str) -> None:
    bad = [c for c in text if c != " " and (unicodedata.category(c)[0] in "CZ")]
    assert not bad, f"{bad} in {text!r}"


@given(texts, st.none() | st.integers(10, 50))
def test_a_legible_text_is_one_line_of_printable_characters_and_no_longer_than_allowed(
    text: str, limit: int | None
) -> None:
    shown = legible(text, limit)
    assert_harmless(shown)
    assert limit is None or len(shown) <= limit
    assert legible(shown) == shown
    if text.isprintable() and limit is None:
        assert shown == text


def _encodable(text: str) -> str:
    return m.wire_text(text)


def _said_to_client(text: str) -> list[list[Any]]:
    """Histories of a client's session in which the server says `text`."""
    nonce = bytes(16)
    welcome = m.Welcome(protocol=m.PROTOCOL, nonce=nonce, abilities=(m.Ability("tcp"),), software=text)
    named = m.Ability(text[:64], {text[:64]: text})
    known = announcement(2)
    identity = ModelIdentity(model=text, engine=text, dtype=text)
    announce = m.Announce(
        block_bytes=known.plan.block_bytes,
        algorithm=text[:64],
        digests=known.digests,
        root=known.root,
        plan=known.plan.digest,
    )
    begun = [e.Connected(nonce), welcome]
    return [
        [*begun, m.Refusal(code="not-held", message=text, hint=text)],
        [*begun, m.Goodbye(code="internal", reason=text)],
        [*begun, m.Waiting(reason=text), m.Goodbye(code="gone", reason=text)],
        [*begun, m.Accepted(identity=identity), announce],
        [e.Connected(nonce), m.Welcome(protocol=m.PROTOCOL, nonce=nonce, abilities=(named,)), *_accepted(known)],
        [*begun, m.ChannelOffer(transport=text[:64], offer=b"")],
    ]


def _accepted(known: e.Announcement) -> list[Any]:
    announce = m.Announce(
        manifest=known.manifest,
        block_bytes=known.plan.block_bytes,
        algorithm=known.algorithm,
        digests=known.digests,
        root=known.root,
        plan=known.plan.digest,
    )
    return [m.Accepted(identity=known.identity), announce, e.Examined(known), e.Pinned()]


def _said_to_server(text: str) -> list[list[Any]]:
    nonce = bytes(16)
    hello = m.Hello(protocol=m.PROTOCOL, nonce=nonce, software=text, abilities=(m.Ability(text[:64]),))
    held = e.Held(announcement(2))
    begun = [e.Connected(nonce), hello]
    return [
        [*begun, m.Identify(identity=ModelIdentity(model=text, dtype=text)), held],
        [*begun, m.Goodbye(code="internal", reason=text)],
        [*begun, m.Identify(), held, e.TurnTaken(), m.Agree(plan=held.announcement.plan.digest, transport=text[:64])],
    ]


@given(texts.map(_encodable))
def test_whatever_a_peer_says_errors_hints_and_notes_are_harmless(text: str) -> None:
    terms = ClientTerms(PullOptions(), identity=ModelIdentity(model="m"), abilities=(m.Ability("tcp", {"host": "a"}),))
    sides: list[tuple[Callable[[], Session], list[list[Any]]]] = [
        (lambda: Session(Side.CLIENT, client=terms), _said_to_client(text)),
        (lambda: Session(Side.SERVER, server=ServerTerms()), _said_to_server(text)),
    ]
    for make, histories in sides:
        for history in histories:
            session = make()
            effects = [effect for event in history for effect in session.handle(event)]
            for effect in effects:
                if isinstance(effect, f.Note):
                    assert_harmless(effect.text)
            if session.error is not None:
                assert_harmless(str(session.error))
                assert_harmless(session.error.hint)
                left = NoSourceLeft([AttemptFailed("h:1", session.error)])
                assert_harmless(str(left))
                for line in console.error_lines(left, argparse.Namespace()):
                    assert_harmless(line)


@given(texts)
def test_a_refusal_is_cut(text: str) -> None:
    error = RefusedError("gone", text * 1000, hint=text * 1000)
    assert len(error.message) <= 2000
    assert len(error.hint) <= 2000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts.map(_encodable), as_json=st.booleans())
def test_a_probe_prints_no_line_that_its_source_made_up(
    text: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = announcement(2)
    manifest = type(known.manifest)((TensorSpec(text[:1000] or "w", "uint8", (4,)), *known.manifest.tensors))
    held = e.Announcement(
        ModelIdentity(model=text, engine=text, dtype=text),
        *(manifest, known.manifest_digest, known.plan, text[:64], known.digests, known.root),
    )

    async def probed(*_: Any, **__: Any) -> Probe:
        return Probe(held, software=text, seconds=0.1, transports=(text[:64],))

    monkeypatch.setattr(api, "probe", probed)
    asked = SimpleNamespace(source="h:1", role="target", timeout=1.0, token_file=None)
    printed = io.StringIO()
    with redirect_stdout(printed):
        probe_command.run(SimpleNamespace(**vars(asked), root="00" * 32, against=None, json=as_json))  # type: ignore[arg-type]
    lines = printed.getvalue().split("\n")
    for line in lines:
        assert_harmless(line)
    assert not any(line.startswith("matches: yes") for line in lines)
    if as_json:
        assert len(lines) == 2


async def test_changing_waiting_texts_write_few_lines_and_the_pull_keeps_its_timeout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def floods(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        count = 0
        while True:
            said = (m.Waiting(reason=f"\x1b[2J{count + n}\n") for n in range(500))
            await wire.stream.send(b"".join(map(encode_frame, said)))  # fails when the client has closed
            count += 500

    caplog.set_level(logging.DEBUG, "netloader")
    began = time.monotonic()
    async with kit.fake_server(floods) as fake:
        with pytest.raises(NetloaderError) as caught:
            await kit.pull(kit.blank(kit.weights()), [fake.address], HUB.transport, timeout=5.0)
        await anyio.lowlevel.checkpoint()
    assert time.monotonic() - began < kit.PATIENCE / 2
    assert len([record for record in caplog.records if "waiting for a turn" in record.getMessage()]) <= 10
    assert "sent Waiting" in str(caught.value)
    for record in caplog.records:
        assert_harmless(record.getMessage())


def test_the_notes_of_a_session_that_are_left_out_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "netloader")
    now = 100.0
    monkeypatch.setattr("netloader.observe.logging.time", SimpleNamespace(monotonic=lambda: now))
    notes = SessionNotes("source h:1")
    for number in range(1000):
        notes.add(f"note {number}")
    now += 61.0
    notes.add("note 1000")
    notes.add("note 1000")
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[-3:] == [
        ("INFO", "source h:1: 990 more since the last line"),
        ("INFO", "source h:1: note 1000"),
        ("DEBUG", "source h:1: note 1000"),
    ]
    assert len(said) == 13
