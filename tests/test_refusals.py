"""docs/refusals.md is current: each named test exists and checks its line, and the code contains each line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from netloader.core.identity import ModelIdentity
from netloader.core.messages import RefusalCode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "refusals.md"
TESTS = ROOT / "tests"
GAP = "\0"
"""What stands for an expression in a text of the code."""

LONG_ENOUGH = 14
"""Letters that a line and the test of it have in common, in a row."""


@dataclass(frozen=True)
class Row:
    section: str
    cells: tuple[str, ...]

    @property
    def test(self) -> tuple[str, str]:
        found = re.fullmatch(r"`(\S+\.py)::(\w+)`", self.cells[-1])
        assert found is not None, self
        return found[1], found[2]

    @property
    def line(self) -> str:
        """The quoted line; for a row of Identity the field, which is the variable part of its line."""
        found = re.fullmatch(r"`([^`]+)`", self.cells[1])
        assert found is not None, self
        return found[1]


def rows() -> Iterator[Row]:
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not re.match(r"\| (Refusal|Field|---)", line):
            yield Row(section, tuple(cell.strip() for cell in line.strip("|").split(" | ")))


ROWS = [*rows()]
OF_IDENTITY = [row for row in ROWS if row.section == "Identity"]
OTHERS = [row for row in ROWS if row.section != "Identity"]


def pieces(line: str) -> list[str]:
    """The constant parts of a quoted line."""
    # A hint in brackets, or a part after a semicolon, is added by other code.
    return [piece.strip() for piece in re.split(r"<[^>]*>|: |; | \(|\)$", line) if len(piece.strip(" :'")) > 2]


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text in a file, with GAP for expressions; texts that are joined by `+` are separate ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def said() -> str:
    """All texts of the code."""
    files = sorted((ROOT / "netloader").rglob("*.py"))
    return "\n\n".join(text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8"))))


def unsaid(line: str) -> list[str]:
    """The pieces of a line that no text of the code has."""
    code = said().replace("`", "")
    return [piece for piece in pieces(line) if piece not in code]


def test_the_page_has_rows() -> None:
    assert len(OF_IDENTITY) > 12
    assert len(OTHERS) > 60
    assert all(len(row.cells) == (3 if row in OF_IDENTITY else 4) for row in ROWS), "a cell too many or too few"


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.line[:60])
def test_the_code_contains_the_line(row: Row) -> None:
    assert pieces(row.line), "the line says nothing of its own"
    assert unsaid(row.line) == []


def test_a_line_that_the_code_does_not_contain_is_detected() -> None:
    assert unsaid("the weights stay as they are: <reason> and this is what nobody says") == [
        "and this is what nobody says"
    ]
    assert unsaid("the weights stay as they are, nobody says") != []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.cells[0]}")
def test_the_named_test_exists_and_looks_for_the_line(row: Row) -> None:
    file, name = row.test
    source = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file} has no test {name}"
    if row in OF_IDENTITY:
        fields = re.findall(r"`(\w+)`", row.cells[0])
        # Where a test goes over all fields, or takes the values from the seed, its case names the field.
        assert all(field in source or "FIELDS" in source for field in fields)
        return
    looked_for = "\n".join(texts(ast.parse(source))).replace("\\", "").replace("`", "")
    assert any(looks_for(piece, looked_for) for piece in pieces(row.line)), f"{file} looks for no part of {row.line!r}"


def looks_for(piece: str, looked_for: str) -> bool:
    wanted = min(LONG_ENOUGH, len(piece))
    return any(piece[at : at + wanted] in looked_for for at in range(len(piece) - wanted + 1))


def test_every_field_of_the_identity_that_can_refuse_has_a_row() -> None:
    told = {field for row in OF_IDENTITY for field in re.findall(r"`(\w+)`", row.cells[0])}
    # Role and layout are looked up, and not held when they differ; load is compared among ranks; settings are compared
    # by their paths.
    paths = {"settings", "processed_settings"}
    assert told == set(ModelIdentity.__struct_fields__) - {"role", "layout", "load"} - paths


CODES = {
    "version": "the server speaks protocol",
    "auth": "the client could not prove that it knows the token",
    "not-held": "nothing is held for",
    "identity": "the identities differ",
    "manifest": "tensors differ from what the server holds",
    "root": "this server holds root",
    "plan": "both sides derived different blocks",
    "transport": "no transport can connect the two sides",
    "not-ready": "the model is still being loaded",
    "busy": "clients are being served and",
    "gone": "the weights are about to change",
    "relay": "this relay gets its blocks from us",
}
"""What the page says of each kind of refusal on the wire."""

FAILURES = {"timeout", "protocol", "internal"}
"""Codes of sessions that broke, rather than being refused."""


def test_every_kind_of_refusal_on_the_wire_has_a_row() -> None:
    assert CODES.keys() | FAILURES == set(get_args(RefusalCode))
    page = PAGE.read_text(encoding="utf-8")
    assert [code for code, line in CODES.items() if line not in page] == []
