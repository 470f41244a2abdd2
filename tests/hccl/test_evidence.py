"""The tables of evidence in docs/hccl.md and README.md: each claim has a level, and tests of that level that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
LEVELS = {"1": "hccl/test_contract.py", "2": ("npu_sim/", "vllm/"), "2a": "ascend/", "3": "hccl/real/"}
"""Level -> where its tests are."""
COEXIST = "hccl/ascend/"
NOT_RUN = "4: not run yet"


def table(page: str, after: str) -> list[list[str]]:
    """The rows below this heading whose table has a column of levels."""
    section = (ROOT / page).read_text(encoding="utf-8").partition(after)[2].partition("\n## ")[0]
    lines = section[section.index("| claim | level |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


ROWS = table("docs/hccl.md", "## Evidence for each claim")
OF_README = table("README.md", "### HCCL: evidence for each claim")


@cache
def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_each_claim_names_tests_of_its_level_that_exist(row: list[str]) -> None:
    _, levels, tests = row
    found = re.findall(r"`([^`]+)`", tests)
    assert found
    for each in found:
        path, _, name = each.partition("::")
        assert (TESTS / path).is_file(), each
        assert not name or name in names(TESTS / path), each
    if levels.startswith("`make coexist`"):
        assert all(each.startswith(COEXIST) for each in found)
        return
    for level in levels.split(", "):
        assert any(each.startswith(LEVELS[level]) for each in found), f"no test of level {level}"


def test_the_tables_have_all_levels_but_hardware() -> None:
    told = {level for row in ROWS for level in row[1].split(", ") if not level.startswith("`")}
    assert told == LEVELS.keys()
    assert OF_README[-1][1] == NOT_RUN
    of_readme = {level for row in OF_README[:-1] for level in row[1].split(", ") if not level.startswith("`")}
    assert of_readme == LEVELS.keys()


def test_claims_that_the_simulator_cannot_show_of_vllm_ascend_are_not_at_its_level() -> None:
    for row in [*ROWS, *OF_README]:
        if re.search(r"sleep|FRACTAL_NZ|casts", row[0]) and row[1] != NOT_RUN:
            assert row[1] == "2", row[0]
