"""What a test has an engine's process do while it serves or pulls: other blocks, no computed ones, a stop half-way."""

from __future__ import annotations

from collections.abc import Callable

from netloader.core.report import Progress
from netloader.observe import Event
from netloader.observe.events import BlocksVerified
from netloader.observe.progress import ProgressLog
from netloader.tensors import holding
from netloader.transports import registry
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from netloader.vllm.load import examine_model, pulling
from netloader.vllm.model import inverses

__all__ = ["compute_nothing", "cut_into", "hold_after", "know_no_fingerprint", "tell_at"]


def cut_into(blocks: int) -> None:
    """Cut what this process serves into about so many blocks. Their size is odd, so they cut rows, tiles and elements.

    Tiny models have a few blocks of the usual size otherwise, which cut none of their tensors.
    """

    def block_bytes_for(nbytes: int) -> int:
        return max(nbytes // blocks, 1024) | 1

    vars(holding)["block_bytes_for"] = block_bytes_for


def compute_nothing() -> None:
    """Find no way back from processed tensors to raw ones, so that a server needs an original of each that changed."""
    vars(inverses)["find_inverse"] = lambda *_: None


def hold_after(block: int) -> None:
    """Have this process's server send nothing after that block of each transfer, over whatever transport."""
    faults = Faults([Fault(FaultKind.HOLD, block, times=None)])
    load: Callable[[str], Transport] = registry.load
    vars(registry)["load"] = lambda name: FaultyTransport(load(name), faults)


def know_no_fingerprint() -> None:
    """Take no fingerprint of the files before a pull, so that a source with other weights is not refused."""
    vars(examine_model)["fingerprint_of_model"] = lambda _: ""


def tell_at(share: float, tell: Callable[[dict[str, int]], None]) -> None:
    """Call `tell` once, with `verified` and `total` bytes, when this process has pulled that share of a model."""
    told = False

    class Telling(ProgressLog):
        def __call__(self, event: Event | Progress) -> None:
            nonlocal told
            if isinstance(event, BlocksVerified) and not told and event.verified >= share * event.total:
                told = True
                tell({"verified": event.verified, "total": event.total})
            super().__call__(event)

    vars(pulling)["ProgressLog"] = Telling
