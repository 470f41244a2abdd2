"""Finds out whether a source that ended the first message without an answer is a server of another loader."""

from __future__ import annotations

import anyio

from netloader.codecs.vllm_ascend import QUESTION, is_answer
from netloader.core.addresses import Address
from netloader.core.protocol import Session
from netloader.errors import NetloaderError, PeerLost

__all__ = ["explained"]

_SECONDS = 2.0
"""Seconds that connecting and the answer may take. Such a server serves one client at a time."""

_ANSWER_BYTES = 4096


async def explained(error: NetloaderError | None, session: Session, source: Address) -> NetloaderError | None:
    """Why a session ended, in other words if the source turns out to be a server of vllm-ascend's own loader.

    Args:
        error: Why it ended, None if it did not fail.
        session: The session, which is over.
        source: The source, which is asked once more if it closed the connection without having said anything.

    Returns:
        `error`, or one that says what the source is.
    """
    if isinstance(error, PeerLost) and not session.heard and await _is_vllm_ascend(source):
        return PeerLost(
            f"{source} is a server of vllm-ascend's own loader, from which netloader can't pull",
            hint="start the source with the package netloader installed, or pull with vllm-ascend's own loader",
        )
    return error


async def _is_vllm_ascend(source: Address) -> bool:
    try:
        with anyio.move_on_after(_SECONDS):
            async with await anyio.connect_tcp(source.host, source.port) as stream:
                await stream.send(QUESTION)
                return is_answer(await stream.receive(_ANSWER_BYTES))
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass  # nobody there any more, or somebody else: the first error says what is known
    return False
