"""The first bytes of a connection are valid UTF-8, and say the same as before to those that speak the protocol."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from netloader.codecs.frames import client_messages, encode_frame
from netloader.codecs.vllm_ascend import NO_JOIN, QUESTION, is_answer
from netloader.core import messages as m
from netloader.core.greeting import READ_AT_MOST, harmless
from tests.core.strategies import message_strategies

NONCE = bytes(range(240, 256))


@given(
    hello=message_strategies[m.Hello],
    nonce=st.binary(min_size=16, max_size=16),
    software=st.text(alphabet="aé€😀", max_size=600),
)
def test_any_first_message_begins_with_text_and_is_read_as_itself(hello: m.Hello, nonce: bytes, software: str) -> None:
    hello = msgspec.structs.replace(hello, nonce=nonce, software=software)
    frame = encode_frame(hello)
    for read in (1, 4, 5, 200, READ_AT_MOST - 1, READ_AT_MOST):
        assert cut_text(frame[:read]), f"the first {read} bytes are not text"
    assert frame[:READ_AT_MOST].decode()
    assert client_messages().feed(frame) == [hello]


def cut_text(data: bytes) -> bool:
    """Whether it is UTF-8, but for a character that is cut at the end."""
    return any(is_text(data[: len(data) - cut]) for cut in range(2))


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_without_the_texts_it_is_no_text() -> None:
    """The check above can fail: this is why the texts are there."""
    body = msgspec.msgpack.encode(m.Hello(protocol=2, nonce=NONCE))
    assert not cut_text(len(body).to_bytes(4, "big") + body)
    assert cut_text(len(harmless(body)).to_bytes(4, "big") + harmless(body)[:1000])


def test_every_length_of_a_first_message_works() -> None:
    for extra in range(600):
        body = harmless(msgspec.msgpack.encode(m.Hello(protocol=2, nonce=NONCE, software="s" * extra)))
        assert is_text((len(body).to_bytes(4, "big") + body)[:READ_AT_MOST]), extra
        assert len(body) < 2300


def test_a_first_message_that_is_larger_than_any_real_one_stays_as_it_is() -> None:
    body = msgspec.msgpack.encode(m.Hello(protocol=2, nonce=NONCE, software="s" * 40_000))
    assert harmless(body) == body


def test_the_answer_to_the_other_loader_is_one_it_reads_whole_and_can_show() -> None:
    assert len(NO_JOIN) <= READ_AT_MOST
    answer = msgspec.json.decode(NO_JOIN)
    assert answer["label"] == "JOIN_NACK"
    assert "pip install netloader" in answer["content"]


def test_its_answers_are_recognised_and_nothing_else_is() -> None:
    assert is_answer(b'{"label": "JOIN_NACK", "content": "Received data does not contain required fields: {}"}')
    others = (b"", QUESTION, NO_JOIN, b"HTTP/1.1 400 Bad Request", b'{"label": 3}', b"\xff\xfe", b"[" * 5000)
    assert not any(map(is_answer, others))
