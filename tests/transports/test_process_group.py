"""LinkChannel over a link that the test controls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.errors import ChannelClosed, PeerLost, TransferTimeout
from netloader.transports.conformance import TensorBlockView
from netloader.transports.io.channel_state import LoopEvent
from netloader.transports.io.worker import Worker
from netloader.transports.process_group import MAX_STAGED, WINDOW, Link, LinkChannel

if TYPE_CHECKING:
    import torch


class Wire:
    """The sent tensors, in order, from which the receiver reads."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []


@dataclass
class Operation:
    tensor: torch.Tensor
    sending: bool


class ScriptedLink(Link):
    """A link whose operations end when they are waited for. It records operations in flight."""

    device = "cpu"

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.flying: list[torch.Tensor] = []
        self.most = 0
        self.most_bytes = 0
        self.entered: list[str] = []
        self.aborted = threading.Event()
        self.closed = 0
        self.waits = False
        self.waiting: LoopEvent | None = None

    def enter(self) -> None:
        self.entered.append(threading.current_thread().name)

    def send(self, tensor: torch.Tensor) -> object:
        return self._start(tensor, sending=True)

    def recv(self, tensor: torch.Tensor) -> object:
        return self._start(tensor, sending=False)

    def finish(self, work: object) -> None:
        if self.waiting is not None:
            self.waiting.set()
        if self.waits:
            assert self.aborted.wait(30)
        assert isinstance(work, Operation)
        tensor, sending = work.tensor, work.sending
        if not any(tensor is one for one in self.flying):
            return  # it was aborted before
        self.flying = [one for one in self.flying if one is not tensor]
        if self.aborted.is_set():
            raise PeerLost("aborted")
        if sending:
            self.wire.messages.append(tensor.numpy().tobytes())
        else:
            data = self.wire.messages.pop(0)
            assert len(data) == tensor.numel()
            tensor.numpy().data[:] = data

    def progress(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.closed += 1

    def _start(self, tensor: torch.Tensor, *, sending: bool) -> object:
        assert tensor.numel() > 0
        assert tensor.dim() == 1
        if self.aborted.is_set():
            raise PeerLost("aborted")
        self.flying.append(tensor)
        self.most = max(self.most, len(self.flying))
        self.most_bytes = max(self.most_bytes, sum(one.numel() for one in self.flying))
        return Operation(tensor, sending)


def channel_over(link: ScriptedLink, stall: float = 30.0) -> LinkChannel:
    return LinkChannel(link, Worker("netloader-test-link", link.abort), stall)


blocks = st.lists(st.lists(st.binary(max_size=20), max_size=4), max_size=40)


@given(blocks)
def test_one_operation_for_each_block_within_the_window(data: list[list[bytes]]) -> None:
    async def main() -> None:
        sent = [TensorBlockView(number, spans) for number, spans in enumerate(data)]
        into = [TensorBlockView(number, [bytes(len(span)) for span in spans]) for number, spans in enumerate(data)]
        link = ScriptedLink(Wire())
        channel = channel_over(link)
        await channel.send(sent)
        assert link.wire.messages == [block.data for block in sent if block.nbytes]
        landed: list[int] = []
        await channel.recv(into, lambda view: landed.append(view.number))
        assert landed == list(range(len(sent)))
        assert [block.data for block in into] == [block.data for block in sent]
        assert link.most <= WINDOW
        await channel.aclose()
        assert link.closed == 1

    anyio.run(main)


async def test_packed_blocks_in_flight_are_bounded_by_bytes() -> None:
    assert MAX_STAGED >= 4 << 20
    for direction in ("send", "recv"):
        link = ScriptedLink(Wire())
        link.max_staged = 1000
        link.wire.messages = [bytes(400) for _ in range(20)] + [bytes(5000)]
        channel = channel_over(link)
        views: Sequence[TensorBlockView] = [TensorBlockView(number, [bytes(200)] * 2) for number in range(20)]
        views = [*views, TensorBlockView(20, [bytes(2500)] * 2)]  # larger than the bound: it is sent alone
        await (channel.send(views) if direction == "send" else channel.recv(views))
        assert link.most == 2
        assert link.most_bytes == 5000
        await channel.aclose()


async def test_large_blocks_of_one_span_are_neither_copied_nor_bounded() -> None:
    link = ScriptedLink(Wire())
    link.max_staged = 10
    channel = channel_over(link)
    views = [TensorBlockView(number, [bytes(100)]) for number in range(3 * WINDOW)]
    await channel.send(views)
    assert link.most == WINDOW
    await channel.aclose()


async def test_later_blocks_are_in_flight_while_one_has_landed() -> None:
    link = ScriptedLink(Wire())
    link.wire.messages = [bytes([number]) for number in range(WINDOW + 5)]
    channel = channel_over(link)
    flying: list[int] = []
    views = [TensorBlockView(number, [b"?"]) for number in range(WINDOW + 5)]
    await channel.recv(views, lambda _: flying.append(len(link.flying)))
    assert flying[0] == WINDOW - 1
    assert flying[-1] == 0
    await channel.aclose()


async def test_without_progress_it_times_out_and_every_posted_operation_is_given_up() -> None:
    link = ScriptedLink(Wire())
    link.waits = True
    channel = channel_over(link, stall=0.05)
    with pytest.raises(TransferTimeout, match=r"no bytes for 0.05 s"):
        await channel.recv([TensorBlockView(number, [b"?"]) for number in range(5)])
    assert link.flying == []
    with pytest.raises(ChannelClosed):
        await channel.recv([])
    await channel.aclose()


async def test_closing_frees_the_thread_and_says_closed() -> None:
    link = ScriptedLink(Wire())
    link.waits = True
    link.waiting = LoopEvent()
    channel = channel_over(link)
    async with anyio.create_task_group() as tasks:

        async def receive() -> None:
            with pytest.raises(ChannelClosed):
                await channel.recv([TensorBlockView(0, [b"?"])])

        tasks.start_soon(receive)
        await link.waiting.wait()
        async with anyio.create_task_group() as closers:
            closers.start_soon(channel.aclose)
            closers.start_soon(channel.aclose)
    assert link.closed == 1
    assert link.flying == []


async def test_the_second_direction_gets_a_thread_of_its_own() -> None:
    link = ScriptedLink(Wire())
    channel = channel_over(link)
    await channel.send([TensorBlockView(0, [b"a"])])
    await channel.recv([TensorBlockView(0, [b"?"])])
    assert link.entered == ["netloader-test-link-recv"]
    await channel.aclose()


async def test_a_failure_to_free_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(ScriptedLink):
        def close(self) -> None:
            raise OSError("stuck")

    channel = channel_over(Stubborn(Wire()))
    await channel.aclose()
    assert "could not be freed" in caplog.text
    assert "stuck" in caplog.text
