"""Fourth step of a load: all ranks of the engine decide together whether they keep what they pulled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.pull_weights import Pulled
from netloader.vllm.model.agreement import (
    Report,
    disagreement,
    exchange,
    groups_of_this_engine,
    load_digest,
    mixture,
    roots_wanted,
)

__all__ = ["Decision", "agree", "agree_on_roots"]

_SLACK = 60.0
_LOAD_LIMIT = 7200.0
"""Seconds that the ranks of one engine may end their loads apart: one may read slow storage while another one pulled,
and nothing tells how long that takes. It bounds a rank that hangs. One that dies ends the wait at once: the connections
of the group break."""


@dataclass(frozen=True)
class Decision:
    """What the ranks decided. All of them come to the same one.

    Attributes:
        told: What this rank told the others.
        reports: What all ranks told, in the same order everywhere.
        why_not: Why no rank keeps what it pulled; empty when all may.
    """

    told: Report
    reports: tuple[Report, ...]
    why_not: str

    @property
    def keeps(self) -> bool:
        """Whether this rank keeps what it pulled."""
        return self.told.outcome == "pulled" and not self.why_not

    @property
    def wants_roots(self) -> bool:
        """Whether the ranks have to compare the roots of what they loaded."""
        return roots_wanted(self.reports)

    @property
    def load(self) -> str:
        """Digest over the roots of all ranks; empty when some are not known."""
        return load_digest(report.root for report in self.reports)

    @property
    def why_default(self) -> str:
        """Why this rank does not have pulled weights."""
        if self.told.outcome == "pulled":
            return f"what was pulled is not kept: {self.why_not}"
        return f"could not pull: {self.told.reason}" if self.told.outcome == "failed" else self.told.reason


def agree(context: Context, pulled: Pulled) -> Decision:
    """Tell the other ranks how the pull went here, and hear how it went there.

    Raises:
        AgreementError: Another rank ended meanwhile, or did not come in time.
        MemoryStillInUse: A thread may still write into this rank's weights. The other ranks know by now.
    """
    reports = exchange(pulled.told, _groups(context), context.config.timeout + _SLACK)
    if pulled.memory_in_use is not None:
        raise pulled.memory_in_use
    return Decision(pulled.told, reports, disagreement(reports))


def agree_on_roots(context: Context, last: Decision, root: str, fingerprint: str) -> Decision:
    """Compare what the ranks have loaded, pulled or not; where no rank needs that, the decision has no reports.

    Args:
        context: This rank's.
        last: What the ranks decided before they loaded this.
        root: Root of what this rank has loaded; empty when it is not known.
        fingerprint: Digest of the checkpoint that it comes from; empty when it is not known.

    Raises:
        AgreementError: Another rank ended meanwhile, or did not come in time.
    """
    if not last.wants_roots:
        return Decision(last.told, (), "")
    kept = not last.why_not and any(report.outcome == "pulled" for report in last.reports)
    told = msgspec.structs.replace(
        last.told, outcome=last.told.outcome if kept else "default", root=root, fingerprint=fingerprint, reason=""
    )
    reports = exchange(told, _groups(context), _LOAD_LIMIT)
    return Decision(told, reports, mixture(reports))


def _groups(context: Context) -> list[tuple[Any, int, int]]:
    # A draft model is loaded by the ranks of the last pipeline stage only.
    return groups_of_this_engine(pipeline=context.role == "target")
