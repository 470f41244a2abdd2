"""All ranks of one engine agree on how the load went, before any of them marks its model ready."""

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
    """The ranks could not be asked: one of them ended, or did not come in time."""


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the load went for one rank.

    Attributes:
        outcome: ``pulled``; ``default``: this rank is configured for the default loader; ``failed``: its pull failed.
        rank: The rank, for messages.
        root: Root of what it pulled.
        load: What its source said about the weights of its whole engine; empty when it said nothing.
        fingerprint: Digest that names the checkpoint, as this rank or its source knows it; empty when neither does.
        reason: Why it failed, in words.
        serves: Whether this rank has a server.
    """

    outcome: Literal["pulled", "default", "failed"]
    rank: int
    root: str = ""
    load: str = ""
    fingerprint: str = ""
    reason: str = ""
    serves: bool = False

    def packed(self) -> bytes:
        """The report in exactly REPORT_BYTES bytes, whatever its texts are."""
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
        """Read what `packed` wrote."""
        length = int.from_bytes(data[:2], "big")
        return msgspec.msgpack.decode(data[2 : 2 + length], type=cls)


def exchange(mine: Report, groups: Sequence[tuple[Any, int, int]], timeout: float) -> tuple[Report, ...]:
    """Tell all ranks of the engine how it went here, and hear how it went there.

    Every rank must call this exactly once per model, whatever happened before. The first group's members swap their
    reports, then each further group swaps all that its members know; so the product of all groups is covered.

    Args:
        mine: This rank's report.
        groups: For each dimension, a CPU process group, its size and this rank's place in it.
        timeout: Seconds to wait for the others, per group.

    Returns:
        One report per rank, in the same order everywhere.

    Raises:
        AgreementError: A rank ended or did not come in time. The groups cannot be used any more.
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
    # A sum over rows that are zero everywhere but at their owner is a gather, and unlike torch's gather its options,
    # which carry the time limit, are public. Without a limit of its own the operation would live on in the group after
    # a wait gave up, and keep the process from ending.
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
    """`text` in at most so many bytes; what UTF-8 cannot say is replaced."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")


def load_digest(roots: Iterable[str]) -> str:
    """One digest over the roots of all ranks, in the order of `exchange`; empty when one of them has no root."""
    every = list(roots)
    if not every or not all(every):
        return ""
    # Places in the engine, not ranks: those count on from one data-parallel replica to the next.
    text = ",".join(f"{place}:{root}" for place, root in enumerate(every))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def disagreement(reports: Sequence[Report]) -> str:
    """Why no rank may keep what it pulled; empty when all may, as far as can be told before the rest is loaded.

    Ranks that load by default are no failure. But all ranks must have weights of one model, and something has to prove
    it: the fingerprint of one checkpoint in every report, or one `load` in the reports of all that pulled (what ranks
    beside them load by default is then compared afterwards, see :func:`mixture`).
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
        # What was pulled is all of what one source's engine holds, or it is not: that settles it.
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
    """Whether the ranks have to take the root of what they loaded: to announce it, or to find a mixture."""
    outcomes = {report.outcome for report in reports}
    return len(outcomes) > 1 or any(report.serves for report in reports)


def mixture(reports: Sequence[Report]) -> str:
    """Why no rank may keep what it pulled, seen after all have loaded; empty when all may.

    Args:
        reports: As in :func:`disagreement`, but with the root of what each rank holds now, pulled or not.
    """
    pulled = [report for report in reports if report.outcome == "pulled"]
    if not pulled or len(pulled) == len(reports):
        return ""
    said, found = pulled[0].load, load_digest(report.root for report in reports)
    if said and found:
        others = ", ".join(str(report.rank) for report in reports if report.outcome != "pulled")
        return "" if said == found else f"rank {others} loaded other weights by default than the source's engine holds"
    if all(report.fingerprint for report in reports):
        return ""  # one checkpoint, as `disagreement` saw
    return "nothing shows that what some ranks loaded by default is what the source's engine holds"


def _by_rank(item: tuple[str, int]) -> int:
    return item[1]
