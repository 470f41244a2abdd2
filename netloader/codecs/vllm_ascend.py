"""What the loader of vllm-ascend that has the same name says: JSON texts without a frame (vllm-ascend 0.23.0).

No weights can be exchanged with it: it sends no names, shapes or digests, so nothing could be compared. Each side only
says to the other's users what they have to change.
"""

from __future__ import annotations

import json

import msgspec

__all__ = ["FIRST_BYTE", "NO_JOIN", "QUESTION", "is_answer"]

FIRST_BYTE = b"{"
"""First byte of what its client says. Ours says 0: no first message has 16 MiB."""

QUESTION = b"{}"
"""What its server answers at once, with a refusal, and without harm."""

NO_JOIN = json.dumps(
    {
        "label": "JOIN_NACK",
        "by": "netloader",
        "content": "this source is a server of the Python package netloader, which speaks another protocol than "
        "vllm-ascend's own loader: run `pip install netloader` beside this vllm-ascend too (its --load-format "
        "netloader is then that of the package), or give a SOURCE that serves with vllm-ascend's own loader",
    }
).encode()
"""The answer to its client, which logs `content` and asks its next source. It reads at most 1024 bytes."""


class _Answer(msgspec.Struct):
    label: str
    by: str = ""


def is_answer(data: bytes) -> bool:
    """Whether `data` is what its server answers to QUESTION. Ours answers NO_JOIN."""
    try:
        answer = msgspec.json.decode(data, type=_Answer)
        return answer.label.startswith("JOIN_") and not answer.by
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
