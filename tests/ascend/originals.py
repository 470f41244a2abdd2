"""Bytes of originals that a server of each kind keeps: a table in docs/ascend-quantisation.md.

They are what the server says in the line with its address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from netloader import sync
from netloader.vllm.serve.serving import ROLES
from tests.ascend.cases import LOSING, Case
from tests.ascend.kinds import KINDS, Store
from tests.ascend.pulls import Instance, settings

HEAD = [
    "| kind | raw tensors | kept if none are computed | kept now: small ones | kept now: lost ones |",
    "| --- | --- | --- | --- | --- |",
]
SMALL = "a few bytes each"
_COST = re.compile(r"([^;,:]+): (\d+) bytes on ")
_ROW = re.compile(r"\| ([^|]+) \| (\d+) \| (\d+)[^|]* \| (\d+)[^|]* \| (\d+)[^|]* \|")


@dataclass(frozen=True)
class Originals:
    """Bytes for one kind, in all of its models.

    Attributes:
        raw: Of the raw tensors.
        uncomputed: Of what a server keeps, by INT8_CACHE and KEEP_RAW, if nothing is computed.
        small: Of small tensors, which are always copied, where the others are computed.
        lost: Of copies of what can't be computed.
    """

    raw: int
    uncomputed: int
    small: int
    lost: int

    def row(self, name: str) -> str:
        """The line of the table."""
        cells = [f"{nbytes} ({100 * nbytes / self.raw:.1f} %)" for nbytes in (self.uncomputed, self.small, self.lost)]
        return f"| {KINDS[name].title} | {self.raw} | {' | '.join(cells)} |"


def rows(page: str) -> dict[str, Originals]:
    """What a page says, by the title of the kind."""
    return {title: Originals(*map(int, cells)) for title, *cells in _ROW.findall(page)}


def kept(seed: Instance) -> dict[str, int]:
    """Bytes that the first rank of a server keeps, for all of its models, by what keeps them."""
    found: dict[str, int] = {}
    (lines,) = ([line for line in lines if " serves " in line] for lines in seed.lines("root ")[:1])
    for line in lines:
        for what, nbytes in _COST.findall(line.partition("originals kept: ")[2]):
            found[what.strip()] = found.get(what.strip(), 0) + int(nbytes)
    return found


def sums(seed: Instance) -> tuple[int, int]:
    """Of these, the bytes of small ones, and the others."""
    found = kept(seed)
    small = found.pop(SMALL, 0)
    return small, sum(found.values())


def raw_bytes(seed: Instance, models: int) -> int:
    """Bytes of what a server of one rank announces of so many models."""
    (address,) = seed.addresses()
    return sum(sync.probe(address, role=role).announcement.manifest.nbytes for role in ROLES[:models])


def measured(name: str, store: Store, folder: Path) -> Originals:
    """Serve a kind twice: with copies and nothing computed, and with copies of what is lost only."""
    folder.mkdir()
    kind, found = KINDS[name], []
    for setting in ("dram", "named" if name in LOSING else "no"):
        case = Case(name, setting)
        with Instance.on(case.cards(0), folder / setting) as seed:
            if setting == "dram":
                seed.all("prepare", computed=False)
            (held,) = seed.load(store.get(kind.model), case.arguments(store.get), settings(**case.server))
            found.append((raw_bytes(seed, len(held["raw"])), *sums(seed)))
    (raw, *uncomputed), (_, small, lost) = found
    return Originals(raw, sum(uncomputed), small, lost)
