"""docs/architecture.md is current: its files and names exist, and its rooms are in the order of their imports."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_walls import MODULES, PACKAGE, imports_of, name_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
TOP = ("tests/", "docs/", "scripts/", "netloader/")
WALKS = ("One pull", "One block", "One control message", "One vLLM load")
TO_ADD = {
    "transport",
    "config field",
    "control message",
    "source provider",
    "observer",
    "codec",
    "supported vLLM release",
}

QUOTED = re.compile(r"`([^`\n]+)`")
A_FILE = re.compile(r"[\w./-]+/|[\w./-]+\.(?:py|md|json|toml)|Makefile")
NUMBERED = re.compile(r"^\d+\. `(?P<file>[^`]+)`: (?P<text>.+(?:\n    .+)*)", re.MULTILINE)


def section(title: str) -> str:
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def place_of(name: str) -> Path:
    """The path of a file that the page names."""
    at_the_top = name.startswith(TOP) or (ROOT / name).is_file()
    return ROOT / name if at_the_top else PACKAGE / name


@dataclass(frozen=True)
class Step:
    walk: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.walk}: {self.file}"


STEPS = [Step(walk, found["file"], found["text"]) for walk in WALKS for found in NUMBERED.finditer(section(walk))]
ROOMS = rows(section("The rooms").split("The adapter is ordered", 1)[0])[1:]
FILES = sorted({name for name in QUOTED.findall(TEXT) if A_FILE.fullmatch(name)})


def contract(name: str) -> list[str]:
    """The layers of one contract of the import linter, from the top; rooms that share a layer one by one."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = (found["layers"] for found in contracts if found["id"] == name)
    return [room for layer in layers for room in layer.split(" | ")]


def packages_of(room: str) -> set[str]:
    """Third-party packages that a room's modules import, except for types only."""
    inside = [path for path in MODULES if name_of(path) == f"{room}.py" or name_of(path).startswith(f"{room}/")]
    assert inside, f"there is no room {room}"
    found = {one.package for path in inside for one in imports_of(path) if not one.for_types_only}
    return found - sys.stdlib_module_names - {"netloader"}


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 80
    assert all(sum(step.walk == walk for step in STEPS) >= 10 for walk in WALKS)
    numbered = re.findall(r"^\d+\. ", TEXT, re.MULTILINE)
    assert len(STEPS) == len(numbered), "a step that names no file first"


@pytest.mark.parametrize("name", FILES)
def test_named_files_exist(name: str) -> None:
    assert place_of(name).is_dir() if name.endswith("/") else place_of(name).is_file()


def test_every_room_is_named_in_the_order_of_the_imports() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    named = [room.strip("`") for room, *_ in ROOMS]
    assert set(named) == there - {"__init__"}
    assert named == contract("rooms")


def test_the_rooms_of_the_adapter_are_named_in_their_order() -> None:
    table = rows(section("The rooms").split("The adapter is ordered", 1)[1])[1:]
    named = [Path(name).stem for room, _ in table for name in QUOTED.findall(room)]
    assert named == contract("vllm")


@pytest.mark.parametrize(("room", "packages"), [(room.strip("`"), packages) for room, _, packages in ROOMS])
def test_rooms_import_the_packages_that_are_named(room: str, packages: str) -> None:
    assert {one for one in packages.split(", ") if one} == packages_of(room)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_names_in_a_step_exist_in_its_file(step: Step) -> None:
    text = place_of(step.file).read_text(encoding="utf-8")
    names = [name for name in QUOTED.findall(step.text) if not A_FILE.fullmatch(name)]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_everything_that_can_be_added_has_a_row_with_code_tests_and_documents() -> None:
    table = rows(section("To add something"))[1:]
    assert {what for what, *_ in table} == TO_ADD
    for what, code, tests, documents in table:
        assert QUOTED.findall(code), what
        assert any(name.startswith("tests/") for name in QUOTED.findall(tests)), what
        assert any(name.endswith(".md") for name in QUOTED.findall(documents)), what
