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
"""Seconds that a rank waits for the others to finish loading. One rank may read slow storage while another one pulled.
The limit is for a rank that hangs. A rank that dies ends the wait at once, because the connections of its groups break.
"""


@dataclass(frozen=True)
class Decision:
    """What the ranks decided. Every rank reaches the same decision.

    Attributes:
        own_report: The report of this rank.
        reports: The reports of all ranks, in the same order at every rank.
        why_not: Why no rank keeps what it pulled; empty when all ranks may keep it.
    """

    own_report: Report
    reports: tuple[Report, ...]
    why_not: str

    @property
    def keeps(self) -> bool:
        """Whether this rank keeps what it pulled."""
        return self.own_report.outcome == "pulled" and not self.why_not

    @property
    def wants_roots(self) -> bool:
        """Whether the ranks have to compare the roots of what they loaded."""
        return roots_wanted(self.reports)

    @property
    def load(self) -> str:
        """Digest over the roots of all ranks; empty when a root is not known."""
        return load_digest(report.root for report in self.reports)

    @property
    def why_default(self) -> str:
        """Why this rank does not have pulled weights."""
        if self.own_report.outcome == "pulled":
            return f"what was pulled is not kept: {self.why_not}"
        return (
            f"could not pull: {self.own_report.reason}"
            if self.own_report.outcome == "failed"
            else self.own_report.reason
        )


def agree(context: Context, pulled: Pulled) -> Decision:
    """Exchange the reports of all ranks about their pulls.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
        MemoryStillInUse: A thread may still write into this rank's weights. The other ranks have its report already.
    """
    reports = exchange(pulled.own_report, _groups(context), context.config.timeout + _SLACK)
    if pulled.memory_in_use is not None:
        raise pulled.memory_in_use
    return Decision(pulled.own_report, reports, disagreement(reports))


def agree_on_roots(context: Context, last: Decision, root: str, fingerprint: str) -> Decision:
    """Compare the weights that the ranks have now, pulled or loaded by default.

    If no rank needs the comparison, nothing is exchanged and the decision has no reports.

    Args:
        context: What was known before this rank built its model.
        last: The decision before these weights were loaded.
        root: Root of the weights of this rank; empty when it is not known.
        fingerprint: Fingerprint of the checkpoint that they come from; empty when it is not known.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
    """
    if not last.wants_roots:
        return Decision(last.own_report, (), "")
    kept = not last.why_not and any(report.outcome == "pulled" for report in last.reports)
    own_report = msgspec.structs.replace(
        last.own_report,
        outcome=last.own_report.outcome if kept else "default",
        root=root,
        fingerprint=fingerprint,
        reason="",
    )
    reports = exchange(own_report, _groups(context), _LOAD_LIMIT)
    return Decision(own_report, reports, mixture(reports))


def _groups(context: Context) -> list[tuple[Any, int, int]]:
    # Only the ranks of the last pipeline stage load a draft model.
    return groups_of_this_engine(pipeline=context.role == "target")
