"""What a stream of a source provider has told, and what it has to tell next. No I/O; the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from netloader.core.sources import Source
from netloader.discovery.base import Appeared, SourceChange, Vanished

__all__ = ["Told"]


@dataclass(slots=True)
class _Told:
    source: Source
    missing: float | None = None  # since when its name is missing


class Told:
    """What one stream has told.

    Args:
        missing: Seconds for which a name may be missing before its source has vanished; 0 for none.
    """

    def __init__(self, missing: float) -> None:
        self._missing = missing
        self._told: dict[str, _Told] = {}

    def __len__(self) -> int:
        return len(self._told)

    @property
    def due(self) -> float | None:
        """When the next missing server will have vanished."""
        return min(
            (told.missing + self._missing for told in self._told.values() if told.missing is not None), default=None
        )

    def changes(self, found: Mapping[str, Source | None], now: float) -> list[SourceChange]:
        """What has changed.

        Args:
            found: The servers by name; None for one that has withdrawn.
            now: The time.
        """
        changes: list[SourceChange] = []
        for name, told in list(self._told.items()):
            if name not in found:
                told.missing = now if told.missing is None else told.missing
                gone = now - told.missing >= self._missing
            else:
                source, told.missing = found[name], None
                gone = source is None or source.generation != told.source.generation
            if gone:
                del self._told[name]
                changes.append(Vanished(told.source.address))
        for name, source in sorted(found.items()):
            if source is None:
                continue
            known = self._told.get(name)
            if known is None or known.source != source:
                self._told[name] = _Told(source)
                changes.append(Appeared(source))
        return changes
