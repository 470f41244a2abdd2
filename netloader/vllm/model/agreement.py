"""All ranks of an engine exchange reports on their load, and agree on whether they keep what they pulled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Literal

import msgspec

from netloader.errors import NetloaderError

__all__ = [
    "AgreementError",
    "Report",
    "disagreement",
    "exchange",
    "groups_of_this_engine",
    "load_digest",
    "mixture",
    "roots_wanted",
]

REPORT_BYTES = 512
_REASON_BYTES = 200
_DIGEST_BYTES = 64


class AgreementError(NetloaderError):
    """The reports could not be exchanged: a rank ended, or did not report in time."""


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the load went for one rank.

    Attributes:
        outcome: ``pulled``; ``default``: this rank is configured for the default loader; ``failed``: its pull failed.
        rank: The rank, for messages.
        root: Root of what it pulled.
        load: Digest over the roots of all ranks of its source's engine, as the source announced it; may be empty.
        fingerprint: Fingerprint of the checkpoint, from this rank's files or its source; empty when it is not known.
        reason: Why it failed.
        serves: Whether this rank has a server.
        final: Whether another pull can't help: this rank's model can only be built anew and loaded by default.
    """

    outcome: Literal["pulled", "default", "failed"]
    rank: int
    root: str = ""
    load: str = ""
    fingerprint: str = ""
    reason: str = ""
    serves: bool = False
    final: bool = False

    def packed(self) -> bytes:
        """The report in exactly REPORT_BYTES bytes. Texts that are too long are cut."""
        body = msgspec.msgpack.encode(
            msgspec.structs.replace(
                self,
                root=_cut(self.root, _DIGEST_BYTES),
                load=_cut(self.load, _DIGEST_BYTES),
                fingerprint=_cut(self.fingerprint, _DIGEST_BYTES),
                reason=_cut(self.reason, _REASON_BYTES),
            )
        )
        return len(body).to_bytes(2, "big") + body.ljust(REPORT_BYTES - 2, b"\0")

    @classmethod
    def unpacked(cls, data: bytes) -> Report:
        """Decode a report that `packed` encoded."""
        length = int.from_bytes(data[:2], "big")
        return msgspec.msgpack.decode(data[2 : 2 + length], type=cls)


def exchange(mine: Report, groups: Sequence[tuple[Any, int, int]], timeout: float) -> tuple[Report, ...]:
    """Exchange the reports of all ranks of the engine.

    Every rank must call this the same number of times per model, also after an error. The members of the first group
    exchange their reports. The members of each further group exchange all reports that they have. So every rank gets
    the reports of all ranks.

    Args:
        mine: This rank's report.
        groups: For each dimension: a CPU process group, its size, and this rank's place in it.
        timeout: Seconds to wait for the other ranks, per group.

    Returns:
        One report per rank, in the same order at every rank.

    Raises:
        AgreementError: A rank ended, or did not report in time. The groups cannot be used any more.
    """
    known = mine.packed()
    for group, size, place in groups:
        if size > 1:
            known = _gather(known, group, size, place, timeout)
    return tuple(Report.unpacked(known[at : at + REPORT_BYTES]) for at in range(0, len(known), REPORT_BYTES))


def groups_of_this_engine(*, pipeline: bool = True) -> list[tuple[Any, int, int]]:
    """CPU groups that together span this engine and nothing else: tensor, prefill-context and pipeline parallel.

    Args:
        pipeline: Whether all pipeline stages load the model in question.
    """
    from vllm.distributed import parallel_state

    # Older versions of vLLM have no prefill-context groups.
    context = getattr(parallel_state, "get_pcp_group", None)
    getters = [parallel_state.get_tp_group, *([] if context is None else [context])]
    if pipeline:
        getters.append(parallel_state.get_pp_group)
    groups = [get_group() for get_group in getters]
    return [(group.cpu_group, int(group.world_size), int(group.rank_in_group)) for group in groups]


def _gather(data: bytes, group: Any, size: int, place: int, timeout: float) -> bytes:
    import torch
    from torch.distributed import AllreduceOptions

    table = torch.zeros((size, len(data)), dtype=torch.uint8, device="cpu")
    table[place] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # Each rank fills its own row, and the rows are summed. That gathers them, and unlike those of torch's gather, the
    # options of this operation are public. They carry the time limit. Without it, the operation would go on in the
    # group after a wait has timed out, and keep the process from ending.
    options = AllreduceOptions()
    options.timeout = timedelta(seconds=timeout)
    try:
        group.allreduce([table], options).wait()
    except RuntimeError as error:
        raise AgreementError(
            f"the other ranks did not report how their load went within {timeout:.0f} s: {error}",
            hint="look for the first error in the logs of the other ranks",
        ) from error
    return bytes(table.numpy())


def _cut(text: str, most: int) -> str:
    """`text` in at most `most` bytes of UTF-8. Characters that UTF-8 cannot encode are replaced."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")


def load_digest(roots: Iterable[str]) -> str:
    """One digest over the roots of all ranks, in the order of `exchange`; empty when a rank has no root."""
    every = list(roots)
    if not every or not all(every):
        return ""
    # Places in the engine, not ranks, because ranks continue from one data-parallel replica to the next.
    text = ",".join(f"{place}:{root}" for place, root in enumerate(every))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def disagreement(reports: Sequence[Report]) -> str:
    """Why no rank may keep what it pulled; empty when all ranks may, as far as is known before the default loader runs.

    A rank that loads by default is not a failure. But it must be proven that all ranks have weights of one model.
    Either every report has the same fingerprint, or all ranks that pulled report the same `load`. In the latter case,
    the weights that other ranks load by default are compared afterwards, see :func:`mixture`.
    """
    failed = [report for report in reports if report.outcome == "failed"]
    if failed:
        return "; ".join(
            f"rank {report.rank} could not pull: {report.reason or 'no reason given'}" for report in failed
        )
    pulled = [report for report in reports if report.outcome == "pulled"]
    if not pulled or len(reports) == 1:
        return ""
    for what, among in (("load", pulled), ("fingerprint", list(reports))):
        named = {getattr(report, what): report.rank for report in reversed(among) if getattr(report, what)}
        if len(named) > 1:
            parts = ", ".join(f"rank {rank} has {value[:16]}" for value, rank in sorted(named.items(), key=_by_rank))
            return f"the ranks have weights of different loads ({what}: {parts})"
    known = next((report.load for report in pulled if report.load), "")
    if known and len(pulled) == len(reports):
        # All ranks pulled. The digest over their roots proves whether they have the weights of one engine.
        together = known == load_digest(report.root for report in reports)
        return "" if together else f"the ranks did not pull what their sources hold together (load {known[:16]})"
    silent = [report.rank for report in pulled if not report.load]
    if silent and not all(report.fingerprint for report in reports):
        return (
            f"nothing shows that all ranks have weights of one model (the source of rank {silent[0]} does not say "
            "which weights its engine holds, and not every rank knows the fingerprint of its checkpoint)"
        )
    return ""


def roots_wanted(reports: Sequence[Report]) -> bool:
    """Whether the ranks need the roots of their weights: to announce them, or to detect different checkpoints."""
    outcomes = {report.outcome for report in reports}
    return len(outcomes) > 1 or any(report.serves for report in reports)


def mixture(reports: Sequence[Report]) -> str:
    """Why no rank may keep what it pulled, after all ranks have loaded; empty when all may.

    Args:
        reports: As in :func:`disagreement`, but with the root of the weights that each rank holds now, pulled or not.
    """
    pulled = [report for report in reports if report.outcome == "pulled"]
    if not pulled or len(pulled) == len(reports):
        return ""
    said, found = pulled[0].load, load_digest(report.root for report in reports)
    if said and found:
        others = ", ".join(str(report.rank) for report in reports if report.outcome != "pulled")
        return "" if said == found else f"rank {others} loaded other weights by default than the source's engine holds"
    if all(report.fingerprint for report in reports):
        return ""  # `disagreement` has compared the fingerprints
    return "nothing shows that what some ranks loaded by default is what the source's engine holds"


def _by_rank(item: tuple[str, int]) -> int:
    return item[1]
