"""Where records lie, how they are compared, and how they are made anew: ``python -m tests.kept.records NAME...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["RECORDS", "differences", "load", "save"]

HERE = Path(__file__).parent

RECORDS = {
    "pulls": "tests.kept.test_pulls",
    "names": "tests.kept.test_names",
    "log": "tests.kept.test_log",
    "wire": "tests.kept.test_wire",
}
"""Each record, and the module whose ``record`` says what it is today."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def save(name: str, found: Mapping[str, Any]) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def differences(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What is not as it was recorded, for a failing test; empty when all is."""
    lines = [f"- {key}: {before[key]!r}" for key in before if key not in now or now[key] != before[key]]
    lines += [f"+ {key}: {now[key]!r}" for key in now if key not in before or now[key] != before[key]]
    if not lines:
        return ""
    meant = f"if this is meant: python -m tests.kept.records {name}, and say in the commit why"
    return "\n".join([f"{name}.json has another record", *lines, meant])


def main(names: list[str]) -> int:
    if not names or not set(names) <= set(RECORDS):
        print(f"usage: python -m tests.kept.records {'|'.join(RECORDS)}...")
        return 2
    for name in names:
        record: Callable[[], Mapping[str, Any]] = import_module(RECORDS[name]).record
        save(name, record())
        print(f"{name}.json is written; look at what changed in it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
