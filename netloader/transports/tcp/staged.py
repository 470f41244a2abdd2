"""Moves blocks of an accelerator's memory over a stream socket, through bounded staging memory on the host.

One lane alternates between copying and network transfer. The lanes of a channel overlap.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import torch

from netloader.codecs.regions import Regions, regions_over
from netloader.codecs.staging import joined, staging
from netloader.transports.base import BlockView
from netloader.transports.io.operation import Operation
from netloader.transports.io.stream import Placed, Stream

__all__ = ["STAGING_BYTES", "StagedStream"]

STAGING_BYTES = 8 << 20
"""Staging memory of one lane: large enough to copy from a device at full speed."""

_FEW = 4
"""Most tensors that are copied to the device one by one. More are copied together."""


class StagedStream(Stream):
    """One connected stream socket, for tensors in device memory.

    Args:
        sock: Connected. This object owns it from now on.
        stall: Seconds without progress after which an operation fails.
        device: Device of the blocks.
        nbytes: Bytes of staging memory.
    """

    def __init__(self, sock: socket.socket, stall: float, device: str, nbytes: int | None) -> None:
        super().__init__(sock, stall)
        self._device = torch.device(device)
        self._room = STAGING_BYTES if nbytes is None else nbytes
        self._stages: dict[str, torch.Tensor] = {}  # by direction: both may be used at once

    def send(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Send blocks in order; see :class:`Stream`."""
        stage = self._stage("send")
        with torch.inference_mode():
            for place, block in blocks:
                if self._device.type != "cpu" and _on_host(
                    block
                ):  # a server keeps copies in host memory, which need no staging
                    super().send([(place, block)], operation)
                    continue
                for pieces, _ in self._portions([(place, block)]):
                    nbytes = self._gather(pieces, stage)
                    if nbytes:
                        self.put(_start_of(stage, nbytes), operation)

    def receive(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Fill blocks in order; see :class:`Stream`."""
        stage = self._stage("receive")
        for pieces, places in self._portions(blocks):
            nbytes = sum(piece.numel() for piece in pieces)
            if nbytes:
                self.fill(_start_of(stage, nbytes), operation)
            with torch.inference_mode():
                self._scatter(pieces, stage[:nbytes])
            for place in places:
                operation.completed(place)

    def _portions(self, blocks: Sequence[Placed]) -> Iterator[tuple[list[torch.Tensor], list[int]]]:
        """Portions that fit into the staging memory, each with the blocks that it completes."""
        room = self._room
        pieces: list[torch.Tensor] = []
        size = 0
        for place, block in blocks:
            for span in block.tensors():
                start = 0
                while start < span.numel():
                    piece = span[start : start + room - size]
                    pieces.append(piece)
                    size += piece.numel()
                    start += piece.numel()
                    if size == room:
                        yield pieces, []
                        pieces, size = [], 0
            yield pieces, [place]
            pieces, size = [], 0

    def _stage(self, direction: str) -> torch.Tensor:
        """The staging memory of a direction. Also makes the device the current one of this thread."""
        _use(self._device)
        if direction not in self._stages:
            self._stages[direction] = staging(self._room, self._device)
        return self._stages[direction]

    @staticmethod
    def _gather(pieces: Sequence[torch.Tensor], stage: torch.Tensor) -> int:
        """Copy from the device; returns the number of bytes."""
        start = 0
        for piece in joined(pieces):
            stage[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
        return start

    def _scatter(self, pieces: Sequence[torch.Tensor], stage: torch.Tensor) -> None:
        """Copy to the device."""
        there = stage
        if len(pieces) > _FEW:
            there = stage.to(self._device)
        start = 0
        for piece in pieces:
            piece.copy_(there[start : start + piece.numel()])
            start += piece.numel()
        if len(pieces) > _FEW:
            _wait_for(self._device)


def _start_of(stage: torch.Tensor, nbytes: int) -> Regions[int]:
    return regions_over([stage.data_ptr()], [nbytes])


def _on_host(block: BlockView) -> bool:
    return all(span.device.type == "cpu" for span in block.tensors())


def _use(device: torch.device) -> None:
    """Make `device` the current device of this thread, which some libraries require."""
    if device.type != "cpu" and device.index is not None:
        torch.get_device_module(device).set_device(device)


def _wait_for(device: torch.device) -> None:
    """Wait until the device has finished the work that this thread queued."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
