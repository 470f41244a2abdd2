"""README.md of this folder has every row of the three lists once, and names every test file of the cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
LISTS = {"first_hour": 30, "hostile": 12, "reports": 21}
SAME_NUMBER = re.compile(r"test_(?:(?:first_hour|hostile|reports)_)?(\d\d)_")


def rows(folder: str) -> dict[int, str]:
    """Number of each row of a list -> where it is shown."""
    section = next(part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE) if f"Folder: `{folder}/`." in part)
    found = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", section, re.MULTILINE)
    assert len(found) == len(dict(found)), "a row stands twice"
    return {int(number): shown_by for number, shown_by in found}


def files(folder: str, shown_by: str) -> list[Path]:
    names = re.findall(r"`([^`]+\.py)`", shown_by)
    return [(ROOT if name.startswith("tests/") else HERE / folder).joinpath(name).resolve() for name in names]


@pytest.mark.parametrize(("folder", "count"), LISTS.items())
def test_every_row_is_there_and_names_files_that_exist_or_says_why_it_is_not_mended(folder: str, count: int) -> None:
    found = rows(folder)
    assert sorted(found) == list(range(1, count + 1))
    for number, shown_by in found.items():
        named = files(folder, shown_by)
        assert named or shown_by.startswith("Not mended here: "), f"{folder} {number}"
        assert [path for path in named if not path.is_file()] == []


def test_every_file_of_the_cases_is_named_in_the_row_of_its_number() -> None:
    named = {(folder, number): files(folder, text) for folder in LISTS for number, text in rows(folder).items()}
    here = [(path.parent.name, path) for path in HERE.glob("*/test_*.py")]
    in_vllm = [
        (next(one for one in LISTS if path.name.startswith(f"test_{one}_")), path)
        for path in (ROOT / "tests" / "vllm" / "cases").glob("test_*.py")
    ]
    assert len(here) > 50
    assert len(in_vllm) >= 3
    for folder, path in here + in_vllm:
        number = SAME_NUMBER.match(path.name)
        assert number, path
        assert path in named[folder, int(number[1])], path
