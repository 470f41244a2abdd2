"""What is served in the tests of pulls: kinds of models, and settings of the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.ascend.kinds import KINDS, Find
from tests.ascend.pulls import Digests

FromDisk = Callable[[str, int], Sequence[Digests]]
"""Of a kind of model and a number of ranks: what it is after a load from its files."""

TRANSPORTS = ("hccl", "tcp")
NO_COPIES: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False}
COPIES: Mapping[str, Mapping[str, Any]] = {"dram": {"INT8_CACHE": "dram"}, "hbm": {"INT8_CACHE": "hbm"}}
LOSING = tuple(name for name, kind in KINDS.items() if kind.lost)


@dataclass(frozen=True)
class Case:
    """What a server has.

    Attributes:
        kind: The kind of model.
        setting: Its `INT8_CACHE`: "dram", "hbm" or "no", the last one with `KEEP_RAW` false; or "named": copies in host
            memory of nothing but what is lost otherwise.
        ranks: Of each instance. Several have expert parallelism.
    """

    kind: str
    setting: str
    ranks: int = 1

    def __str__(self) -> str:
        return "-".join([self.kind, self.setting, *(["ranks"] if self.ranks > 1 else [])])

    @property
    def server(self) -> Mapping[str, Any]:
        """The settings of the server."""
        if self.setting == "named":
            return {"INT8_CACHE": "dram", "INT8_CACHE_NAME": list(KINDS[self.kind].lost), "KEEP_RAW": False}
        return COPIES.get(self.setting, NO_COPIES)

    def arguments(self, find: Find) -> dict[str, Any]:
        """Those of the engines."""
        return {**KINDS[self.kind].arguments(find), **({"enable_expert_parallel": True} if self.ranks > 1 else {})}

    def cards(self, instance: int) -> Sequence[int]:
        """Those of the first, second or third instance."""
        return range(instance * self.ranks, (instance + 1) * self.ranks)
