"""Frames: any bytes are messages or one clean error, wherever the stream is cut."""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.codecs import announcements
from netloader.codecs.announcements import OTHER_BYTES
from netloader.codecs.frames import (
    CLIENT_FRAME_CAP,
    LARGE_FRAME,
    SERVER_FRAME_CAP,
    FrameDecoder,
    client_messages,
    encode_frame,
    server_messages,
)
from netloader.core import messages as m
from netloader.core.greeting import harmless
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import MAX_TENSORS, Manifest, TensorSpec, manifest_digest
from netloader.errors import LocalProtocolError, RemoteProtocolError
from tests.core import golden, strategies

CLIENT_KINDS, SERVER_KINDS = get_args(m.ClientMessage), get_args(m.ServerMessage)
BOTH = (client_messages, server_messages)


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def frame_of(**fields: Any) -> bytes:
    return frame(msgspec.msgpack.encode(fields))


def decoder_for(message: Any) -> FrameDecoder[Any]:
    return client_messages() if isinstance(message, CLIENT_KINDS) else server_messages()


def outcome(decoder: FrameDecoder[Any], pieces: Sequence[bytes]) -> tuple[list[Any], str]:
    """Everything that comes out of `pieces`: the messages, and then the error or what is left unfinished."""
    messages: list[Any] = []
    try:
        for piece in (*pieces, b""):
            messages += decoder.feed(piece)
    except RemoteProtocolError as error:
        return messages, str(error)
    return messages, f"{decoder.pending} bytes left"


def cuts(stream: bytes, at: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(stream)) for place in at), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def error_for(decoder: FrameDecoder[Any], data: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        decoder.feed(data)
    assert caught.value.hint
    return caught.value


# --- what was sent comes out ----------------------------------------------------------------------------------------


def test_each_message_has_a_strategy_and_golden_examples() -> None:
    kinds = {*CLIENT_KINDS, *SERVER_KINDS}
    assert kinds == set(strategies.message_strategies)
    assert kinds == {type(message) for message in golden.EXAMPLES.values()}
    for kind in kinds:
        given = [message for message in golden.EXAMPLES.values() if type(message) is kind]
        for field in msgspec.structs.fields(kind):
            assert any(getattr(message, field.name) != field.default for message in given), (kind, field.name)
    fields = {f.name for f in msgspec.structs.fields(ModelIdentity)}
    examples = (golden.IDENTITY, golden.NAMED, golden.SET)
    assert {f for f in fields for i in examples if getattr(i, f) != getattr(ModelIdentity(), f)} == fields


@pytest.mark.parametrize("kinds", [CLIENT_KINDS, SERVER_KINDS], ids=["client", "server"])
@given(data=st.data())
def test_messages_round_trip_whole_and_byte_by_byte_and_with_trailing_bytes(
    kinds: tuple[type, ...], data: st.DataObject
) -> None:
    one = st.one_of(*(strategies.message_strategies[kind] for kind in kinds))
    sent = data.draw(st.lists(one, min_size=1, max_size=4))
    stream = b"".join(encode_frame(message) for message in sent)
    make = client_messages if kinds is CLIENT_KINDS else server_messages
    assert outcome(make(), [stream]) == (sent, "0 bytes left")
    assert outcome(make(), [bytes([byte]) for byte in stream]) == (sent, "0 bytes left")
    assert outcome(make(), cuts(stream, data.draw(st.lists(st.integers(0, 2000), max_size=6)))) == (
        sent,
        "0 bytes left",
    )
    trailing = encode_frame(sent[0])[:-1]
    assert outcome(make(), [stream + trailing]) == (sent, f"{len(trailing)} bytes left")


@pytest.mark.parametrize("name", golden.EXAMPLES)
def test_golden_frames_are_unchanged(name: str) -> None:
    message, wire = golden.EXAMPLES[name], golden.load()[name]
    frame = encode_frame(message)
    if name.startswith("Hello"):  # begins with more since protocol 2, see tests/core/test_greeting.py
        assert frame[4:] == harmless(wire[4:])
    else:
        assert frame == wire
    assert decoder_for(message).feed(frame) == decoder_for(message).feed(wire) == [message]


def test_every_golden_frame_is_checked() -> None:
    assert golden.load().keys() == golden.EXAMPLES.keys()


# --- any bytes ------------------------------------------------------------------------------------------------------


def mutated(stream: bytes, edits: Sequence[tuple[int, int]]) -> bytes:
    broken = bytearray(stream)
    for place, value in edits:
        broken[place % len(broken)] = value
    return bytes(broken)


random_bytes = st.binary(max_size=200)
mutated_frames = st.builds(
    mutated,
    st.lists(strategies.any_message, min_size=1, max_size=3).map(lambda sent: b"".join(map(encode_frame, sent))),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
)


@given(stream=random_bytes | random_bytes.map(frame) | mutated_frames, at=st.lists(st.integers(0, 300), max_size=5))
@example(stream=frame(b""), at=[])
@example(stream=b"GET / HTTP/1.1\r\n\r\n", at=[])
@example(stream=frame(b"\xc1"), at=[2])
@example(stream=frame(b"\x91" * 100_000), at=[])
@example(stream=frame(b"\x82\xa4type\xa6Signal\xa2zz" + b"\x91" * 100_000), at=[])
@example(stream=frame(b"\x82\xa4type\xa7Goodbye\xa6reason\xa2\xff\xfe"), at=[])
@example(stream=encode_frame(m.Goodbye()) + frame(b"\xc1") + encode_frame(m.Goodbye()), at=[])
@example(stream=frame(b"\x82\xa4type\xa8Announce\xa8manifest\x91\xdd\xff\xff\xff\xff"), at=[])
def test_any_bytes_give_the_same_messages_and_at_most_one_error_however_they_are_split(
    stream: bytes, at: list[int]
) -> None:
    for make in BOTH:
        whole = outcome(make(), [stream])
        assert outcome(make(), cuts(stream, at)) == whole
        if len(stream) < 1000:
            assert outcome(make(), [bytes([byte]) for byte in stream]) == whole


def test_a_broken_decoder_stays_broken() -> None:
    decoder = client_messages()
    first = error_for(decoder, frame(b"\xc1"))
    assert error_for(decoder, encode_frame(m.Goodbye())) is first
    assert error_for(decoder, b"") is first
    assert decoder.pending == 0, "and keeps nothing of what it was sent"


@pytest.mark.parametrize(("make", "cap"), [(client_messages, CLIENT_FRAME_CAP), (server_messages, SERVER_FRAME_CAP)])
def test_the_cap_is_checked_before_the_body_is_there(make: Any, cap: int) -> None:
    error = error_for(make(), struct.pack(">I", cap + 1))
    assert str(cap + 1) in str(error)
    assert str(cap) in str(error)
    decoder = make()
    assert decoder.feed(struct.pack(">I", cap)) == []
    assert decoder.pending == 4


def test_the_length_is_checked_as_soon_as_its_four_bytes_have_arrived() -> None:
    decoder = client_messages()
    assert decoder.feed(b"\xff\xff\xff") == []
    error_for(decoder, b"\xff")


# --- peers that are newer, older, or no peers at all ------------------------------------------------------------------


def test_unknown_fields_are_ignored_wherever_they_are() -> None:
    wire = frame_of(
        type="Hello",
        protocol=1,
        nonce=bytes(16),
        shiny={"new": [1, 2]},
        abilities=[{"name": "tcp", "facts": {}, "speed": 9}],
    )
    assert client_messages().feed(wire) == [m.Hello(protocol=1, nonce=bytes(16), abilities=(m.Ability("tcp"),))]


@pytest.mark.parametrize("make", BOTH)
def test_an_unknown_message_is_refused_by_name(make: Any) -> None:
    error = error_for(make(), frame_of(type="Teleport", to="there"))
    assert "'Teleport'" in str(error)
    assert "Goodbye" in str(error)


def test_a_message_of_the_other_direction_is_refused_by_name() -> None:
    assert "'Welcome'" in str(error_for(client_messages(), encode_frame(m.Welcome(protocol=1, nonce=bytes(16)))))
    assert "'Want'" in str(error_for(server_messages(), encode_frame(m.Want(ranges=()))))


def test_a_wrong_field_is_named() -> None:
    error = error_for(client_messages(), frame_of(type="Want", ranges=[[0, "x"]]))
    assert "a Want that is not valid" in str(error)
    assert "$.ranges[0][1]" in str(error)


def test_the_error_stays_short_whatever_the_peer_sends() -> None:
    assert len(str(error_for(client_messages(), frame_of(type="x" * 200_000)))) < 1000


BAD: list[dict[str, Any]] = [
    {"type": "Hello", "protocol": 0, "nonce": bytes(16)},
    {"type": "Hello", "protocol": 1, "nonce": bytes(15)},
    {"type": "Hello", "protocol": 1, "nonce": bytes(16), "software": "x" * 4097},
    {"type": "Hello", "protocol": 1, "nonce": bytes(16), "abilities": [{"name": "x"}] * 33},
    {"type": "Hello", "protocol": 1, "nonce": bytes(16), "abilities": [{"name": "x" * 65}]},
    {"type": "Identify", "manifest": "xyz"},
    {"type": "Identify", "manifest": "a" * 65},
    {"type": "Identify", "manifest": "aa\n"},
    {"type": "Identify", "proof": bytes(33)},
    {"type": "Identify", "layouts": ["raw"] * 9},
    {"type": "Identify", "layouts": ["sideways"]},
    {"type": "Identify", "identity": {"tp_size": "2"}},
    {"type": "Want", "ranges": [[0, 1]] * (m.MAX_RANGES + 1)},
    {"type": "Want", "ranges": [[-1, 1]]},
    {"type": "Want", "ranges": [[0, (1 << 20) + 1]]},
    {"type": "Want", "ranges": [[0, 1, 2]]},
    {"type": "Want"},
    {"type": "Signal", "data": bytes(65537)},
    {"type": "Verdict", "outcome": "splendid"},
    {"type": "Verdict", "outcome": "complete", "blocks": -1},
    {"type": "Waiting", "reason": "x", "position": -1},
    {"type": "Announce", "block_bytes": 1023, "algorithm": "", "digests": b"", "root": "", "plan": ""},
    {"type": "Announce", "block_bytes": (1 << 30) + 1, "algorithm": "", "digests": b"", "root": "", "plan": ""},
    {"type": "Refusal", "code": "mood", "message": ""},
    {"type": "Refusal", "code": "busy", "message": "", "retry_after": -1.0},
    {"type": "Refusal", "code": "busy", "message": "", "retry_after": float("nan")},
    {"type": "Refusal", "code": "busy", "message": "", "retry_after": float("inf")},
    {"type": "Refusal", "code": "busy", "message": "", "sources": ["h:1"] * 65},
    {"type": "Goodbye", "code": "well"},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: f"{fields['type']}-{list(fields)[-1]}")
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    kinds = {kind.__name__ for kind in CLIENT_KINDS}
    make = client_messages if fields["type"] in kinds else server_messages
    assert f"a {fields['type']} that is not valid" in str(error_for(make(), frame_of(**fields)))


def test_a_manifest_cannot_be_longer_than_its_limit() -> None:
    tensors = msgspec.Raw(b"\xdd" + struct.pack(">I", MAX_TENSORS + 1) + b"\xc0" * (MAX_TENSORS + 1))
    body = msgspec.msgpack.encode({"type": "Announce", "manifest": [tensors]})
    assert f"<= {MAX_TENSORS}" in str(error_for(server_messages(), frame(body)))


def test_a_long_manifest_is_decoded_in_parts_to_the_same() -> None:
    specs = [
        TensorSpec(f"layers.{n}.weight", "bfloat16", (n, 3), (1, n) if n % 3 == 0 else ()) for n in range(1, 30_000)
    ]
    specs.append(TensorSpec("tied", "bfloat16", (2, 3), alias_of="layers.2.weight"))
    said = m.Announce(
        manifest=Manifest(tuple(specs)), block_bytes=1024, algorithm="x", digests=b"d", root="a", plan="b"
    )
    frame = encode_frame(said)
    assert len(frame) > 2 * LARGE_FRAME
    assert server_messages().feed(frame) == [said]
    assert (
        manifest_digest(said.manifest or Manifest(()))
        == hashlib.blake2b(msgspec.msgpack.encode(said.manifest), digest_size=32).hexdigest()
    )
    wrong = error_for(server_messages(), frame.replace(b"bfloat16", b"bfloat\xc1\xc1"))
    assert "a Announce that is not valid" in str(wrong)


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
values = st.recursive(
    scalars | st.text(max_size=300) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
)


@given(value=values, behind=st.binary(max_size=20))
@example(value=["x" * 70_000, b"y" * 70_000, list(range(70_000)), {str(n): n for n in range(70_000)}], behind=b"\xc0")
@example(value=[msgspec.msgpack.Ext(3, bytes(size)) for size in (0, 1, 2, 4, 8, 16, 300, 70_000)], behind=b"")
def test_the_end_of_a_value_is_found_without_decoding_it(value: Any, behind: bytes) -> None:
    encoded = msgspec.msgpack.encode(value)
    assert announcements._end_of(encoded + behind, 0, 1 << 20) == len(encoded)
    assert announcements._end_of(encoded[:-1], 0, 1 << 20) is None
    assert announcements._end_of(b"\xc0" + memoryview(encoded), 1, 1 << 20) == len(encoded) + 1


def decoded_in_parts(body: bytes) -> m.Announce:
    parts = announcements.decode_in_parts(body, msgspec.msgpack.Decoder(m.Announce).decode)
    while True:
        try:
            next(parts)
        except StopIteration as end:
            announce: m.Announce = end.value
            return announce


@given(said=strategies.message_strategies[m.Announce])
def test_any_announcement_is_the_same_when_it_is_decoded_in_parts(said: m.Announce) -> None:
    assert decoded_in_parts(encode_frame(said)[4:]) == said


@given(
    said=strategies.message_strategies[m.Announce],
    edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_what_is_decoded_in_parts_is_what_is_decoded_at_once_or_refused(
    said: m.Announce, edits: list[tuple[int, int]]
) -> None:
    body = mutated(encode_frame(said)[4:], edits)
    try:
        in_parts = decoded_in_parts(body)
    except (RemoteProtocolError, msgspec.MsgspecError, UnicodeDecodeError):
        return
    assert in_parts == msgspec.msgpack.decode(body, type=m.Announce)


def test_fields_of_a_later_release_are_passed_over() -> None:
    body = msgspec.msgpack.decode(encode_frame(said_shortly())[4:])
    later = {**body, "manifest": [*body["manifest"], {"more": [1, 2]}], **{f"later {n}": [n] * 20 for n in range(20)}}
    assert decoded_in_parts(msgspec.msgpack.encode(later)) == said_shortly()


def said_shortly() -> m.Announce:
    manifest = Manifest((TensorSpec("w", "bfloat16", (2, 3)),))
    return m.Announce(manifest=manifest, block_bytes=1024, algorithm="x", digests=b"d", root="a", plan="b")


# --- long frames ----------------------------------------------------------------------------------------------------


def long(**fields: Any) -> bytes:
    return frame_of(**fields, padding=bytes(LARGE_FRAME))


@pytest.mark.parametrize(
    "stream",
    [
        long(type="Grant", ranges=[[0, 1]]),
        long(ranges=[[0, 1]], type="Announce"),
        frame(b"\xc0" * (LARGE_FRAME + 1)),
        long(type="Announced"),
    ],
    ids=["another message", "type not first", "no map", "another name"],
)
def test_only_an_announcement_may_be_long_and_that_shows_in_its_first_bytes(stream: bytes) -> None:
    early, late = server_messages(), server_messages()
    assert "no announcement" in str(error_for(early, stream[:40]))
    assert "no announcement" in str(error_for(late, stream))


def test_a_session_has_one_long_announcement() -> None:
    said = msgspec.structs.replace(said_shortly(), digests=bytes(LARGE_FRAME))
    decoder = server_messages()
    assert decoder.feed(encode_frame(said)) == [said]
    assert f"at most {LARGE_FRAME}" in str(error_for(decoder, encode_frame(said)[:4]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"manifest": [[["w" * 600_000, "uint8", []]]]}, "a tensor that is cut"),
        ({"manifest": [[["w", "uint8", [0] * 300]]], "padding": bytes(LARGE_FRAME)}, "more than 256 elements"),
        ({"manifest": [7], "padding": bytes(LARGE_FRAME)}, "no list of tensors"),
        ({"metadata": {str(n): "" for n in range(40_000)}, "padding": bytes(LARGE_FRAME)}, "more than 65536 elements"),
        ({"padding": bytes(OTHER_BYTES)}, "besides its tensors"),
        ({f"f{n}": 0 for n in range(70)} | {"padding": bytes(LARGE_FRAME)}, "at most 64 fields"),
        ({"manifest": [[["n" * 1000, "uint8", []]] * 60_000]}, "tensors of more than"),
    ],
)
def test_a_long_announcement_that_breaks_a_limit_is_refused(fields: dict[str, Any], says: str) -> None:
    refused = error_for(server_messages(), frame_of(type="Announce", **fields))
    assert re.search(says, str(refused)), refused


# --- what this side would send --------------------------------------------------------------------------------------


def too_large() -> Iterator[tuple[m.ClientMessage | m.ServerMessage, str]]:
    yield m.Identify(identity=ModelIdentity(model="x" * CLIENT_FRAME_CAP)), "Identify takes"
    yield m.Accepted(identity=ModelIdentity(model="half \udcff")), "cannot be sent"
    yield m.Accepted(identity=ModelIdentity(tp_size=1 << 70)), "cannot be sent"


@pytest.mark.parametrize(("message", "says"), list(too_large()))
def test_a_message_that_the_peer_could_not_decode_is_not_sent(
    message: m.ClientMessage | m.ServerMessage, says: str
) -> None:
    with pytest.raises(LocalProtocolError, match=says) as caught:
        encode_frame(message)
    assert caught.value.hint


@given(text=st.text(max_size=50) | st.text(st.characters(categories=["Cs", "Ll"]), max_size=5000))
def test_any_text_can_be_shortened_to_fit(text: str) -> None:
    (received,) = client_messages().feed(encode_frame(m.Goodbye(reason=m.wire_text(text))))
    assert isinstance(received, m.Goodbye)
    sayable = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
    if sayable and len(text) <= m.MAX_TEXT:
        assert received.reason == text


def test_sources_that_do_not_fit_are_left_out() -> None:
    assert m.wire_sources(("a:1", "x" * 301, "b:2")) == ("a:1", "b:2")
    assert len(m.wire_sources(("a:1",) * 100)) == m.MAX_SOURCES
