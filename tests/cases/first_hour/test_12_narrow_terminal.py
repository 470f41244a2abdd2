"""A progress bar on a narrow terminal leaves out whole fields and never cuts a number."""

from __future__ import annotations

import io
import re

import pytest

from netloader.core.report import Progress
from netloader.observe import SourceWaiting
from netloader.observe.progress import ProgressBar

MB = 1_000_000
WAIT = SourceWaiting(43.0, "10.0.0.7:19374", "the model is still being loaded", 43.0, 120.0)


def drawn(columns: int, event: Progress | SourceWaiting) -> str:
    terminal = io.StringIO()
    with ProgressBar(terminal, columns=lambda: columns) as bar:
        bar(event)
    return terminal.getvalue().removeprefix("\r\x1b[K").rstrip("\n")


def fields(text: str) -> set[str]:
    return {found.rstrip(".:,") for found in re.findall(r"\d[\d.:]*(?: ?[kMG]?B/s| of \d+ s|%| left)?", text)}


@pytest.mark.parametrize("event", [Progress(123_400_000, 404 * MB, 6.17, "a"), WAIT], ids=["transfer", "wait"])
def test_fields_are_whole_at_every_width(event: Progress | SourceWaiting) -> None:
    whole = fields(drawn(200, event))
    for columns in range(1, 120):
        text = drawn(columns, event)
        assert len(text) <= columns
        assert fields(text) <= whole, f"a number is cut at {columns} columns: {text!r}"


def test_forty_columns_show_share_rate_and_time_left() -> None:
    assert drawn(40, Progress(123_400_000, 404 * MB, 6.17, "a")) == "  30% 20.0 MB/s  0:15 left"


def test_forty_columns_show_how_long_a_wait_takes() -> None:
    assert drawn(45, WAIT) == "waiting for 10.0.0.7:19374, 43 of 120 s"
    assert drawn(30, WAIT) == "waiting, 43 of 120 s"
