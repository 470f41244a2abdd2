"""One line for each check, and a report of all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["ByHandError", "Checklist", "FoundError", "Line", "NotRunError"]

Outcome = Literal["PASS", "FAIL", "MANUAL", "SKIP"]
_LONGEST = 2000
"""Characters of a line: an error may have a whole log in it."""


class ByHandError(Exception):
    """A check cannot run here; the message says what to do by hand."""


class NotRunError(Exception):
    """A check needs what another check has not made; the message says which one."""


class FoundError(AssertionError):
    """A check failed; the message says what was found."""


@dataclass(frozen=True)
class Line:
    """The result of a check.

    Attributes:
        name: Of the check.
        outcome: PASS, FAIL, MANUAL (something has to be done by hand), or SKIP (an earlier check failed).
        text: What was measured or found.
        remedy: What to do; empty if the check did not fail.
        seconds: How long it took.
    """

    name: str
    outcome: Outcome
    text: str
    remedy: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome} {self.name}: {self.text}" + (f" To do: {self.remedy}" if self.remedy else "")


@dataclass
class Checklist:
    """Runs checks, prints a line for each as soon as it is known, and keeps the lines for the report."""

    lines: list[Line] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(line.outcome == "FAIL" for line in self.lines)

    def run(self, name: str, check: Callable[[], str], remedy: str = "") -> None:
        """Run a check. It returns what it measured, or raises.

        Args:
            name: Of the check.
            check: Raises `ByHandError` or `NotRunError` if it cannot run. Any other error is a failure.
            remedy: What to do if it fails.
        """
        began = time.monotonic()
        outcome: Outcome = "PASS"
        try:
            text = check()
        except ByHandError as error:
            outcome, text = "MANUAL", str(error)
        except NotRunError as error:
            outcome, text = "SKIP", str(error)
        except FoundError as error:
            outcome, text = "FAIL", str(error)
        except Exception as error:  # noqa: BLE001 - one line for each check, whatever it found
            outcome, text = "FAIL", f"{type(error).__name__}: {error}"
        text = " / ".join(text.splitlines())[:_LONGEST]
        self.add(Line(name, outcome, text, remedy if outcome == "FAIL" else "", time.monotonic() - began))

    def add(self, line: Line) -> None:
        """Print a line, and keep it."""
        self.lines.append(line)
        print(line, flush=True)

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write `report.json` and `report.txt`.

        Args:
            folder: Where to.
            about: What was checked, and with what; goes into the JSON file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        report = {**about, "failed": self.failed, "checks": [asdict(line) for line in self.lines]}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "report.txt").write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")
