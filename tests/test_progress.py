"""How progress is shown: its text, how often, and on a terminal. No test waits: progress events carry their time."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core.report import Progress
from netloader.observe import BlocksVerified, PhaseEnded, PullBegan, PullEnded
from netloader.observe.progress import ProgressBar, ProgressLog, Rate, byte_text, time_text

MB = 1_000_000


def at(seconds: float, verified: int, total: int = 100 * MB) -> Progress:
    return Progress(verified, total, seconds, "10.0.0.7:19374")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_194_304, "4.19 MB"),
        (41_943_040, "41.9 MB"),
        (999_600_000, "1.00 GB"),
        (141_000_000_000, "141 GB"),
        (2 * 10**21, "2000 EB"),
    ],
)
def test_bytes_are_written_with_a_unit(nbytes: int, text: str) -> None:
    assert byte_text(nbytes) == text


@given(st.integers(0, 10**20))
@example(999_949)
@example(9_995_000)
def test_bytes_are_written_to_within_one_percent(nbytes: int) -> None:
    number, unit = byte_text(nbytes).split()
    value = float(number) * 1000 ** ("B", "kB", "MB", "GB", "TB", "PB", "EB").index(unit)
    assert abs(value - nbytes) <= 0.006 * nbytes
    assert len(number) <= 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (0.2, "0:01"), (59.5, "1:00"), (725, "12:05"), (3729, "1:02:09")]
)
def test_times_are_rounded_up(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate(window=5)
    assert rate.per_second == 0
    for second in range(1, 11):
        rate.add(second, second * 10 * MB)
    assert rate.per_second == pytest.approx(10 * MB)
    for second in range(11, 17):  # six seconds at a tenth of it: what was before them is forgotten
        rate.add(second, 100 * MB + (second - 10) * MB)
    assert rate.per_second == pytest.approx(MB)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**12)), max_size=200))
def test_the_rate_is_never_negative_and_never_above_the_fastest_step(steps: list[tuple[float, int]]) -> None:
    rate, seconds, nbytes = Rate(), 0.0, 0
    for step, more in steps:
        seconds, nbytes = seconds + step, nbytes + more
        rate.add(seconds, nbytes)
        assert rate.per_second >= 0
        assert len(rate._samples) <= 5 / 0.05 + 4
    if seconds > 0 and seconds <= 5:
        assert rate.per_second == pytest.approx(nbytes / seconds)


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, every=5)
    for tenth in range(1, 121):
        log(at(tenth / 10, tenth * MB // 2))
    log(at(12.1, 100 * MB))
    log(at(12.2, 100 * MB))
    assert lines == [
        "pulled 25.0 MB of 100 MB (25%), 5.00 MB/s, 0:15 left",
        "pulled 50.0 MB of 100 MB (50%), 5.00 MB/s, 0:10 left",
        "pulled 100 MB of 100 MB (100%), 8.26 MB/s",
    ]


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(0, 50))
def test_plain_lines_keep_their_distance(pauses: list[float], total: int) -> None:
    said: list[float] = []
    now = 0.0
    log = ProgressLog(lambda line: said.append(now), every=5)
    for verified, pause in enumerate(pauses):
        now += pause
        log(at(now, min(verified, total), total))
    ends = 1 if 0 < total < len(pauses) else 0
    for before, after in zip([0.0, *said], said[: len(said) - ends], strict=False):
        assert after - before >= 5


def test_the_activity_can_be_named() -> None:
    lines: list[str] = []
    ProgressLog(lines.append, every=0, verb="hashed")(at(1, MB))
    assert lines == ["hashed 1.00 MB of 100 MB (1%), 1.00 MB/s, 1:39 left"]


def test_the_rate_counts_from_the_open_channel() -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, every=1.0)
    log(PhaseEnded("client", 1, "h:1", "connect", 1.0))
    log(PhaseEnded("client", 1, "h:1", "plan", 5.0))
    log(Progress(100_000_000, 200_000_000, 7.0, "h:1"))
    log(Progress(200_000_000, 200_000_000, 8.0, "h:1"))
    assert lines == ["pulled 100 MB of 200 MB (50%), 100 MB/s, 0:01 left", "pulled 200 MB of 200 MB (100%), 100 MB/s"]


def test_an_unknown_total_does_not_divide_by_zero() -> None:
    lines: list[str] = []
    ProgressLog(lines.append, every=0)(at(0, 0, total=0))
    assert lines == ["pulled 0 B of 0 B, 0 B/s"]


@pytest.mark.parametrize("columns", [200, 80, 40, 20, 1])
def test_a_bar_fits_its_terminal_and_leaves_its_line(columns: int) -> None:
    terminal = io.StringIO()
    with ProgressBar(terminal, columns=lambda: columns) as bar:
        for eighth in range(101):
            bar(at(eighth / 8, eighth * MB))
    drawings = terminal.getvalue().split("\r\x1b[K")[1:]
    assert len(drawings) == 100
    assert all(len(drawing.rstrip("\n")) <= columns for drawing in drawings)
    assert drawings[-1].endswith("\n")
    assert "\n" not in "".join(drawings[:-1])
    if columns == 80:
        assert re.fullmatch(r" {2}50% \|(#+)(-+)\| 50\.0 MB of 100 MB {2}8\.00 MB/s {2}0:07 left", drawings[49])
        assert drawings[-1].startswith(" 100% |#")
        assert "-" not in drawings[-1].partition("MB of")[0]


def test_a_bar_is_not_drawn_for_every_block() -> None:
    terminal = io.StringIO()
    with ProgressBar(terminal, every=0.1, columns=lambda: 80) as bar:
        for thousandth in range(1000):
            bar(at(thousandth / 1000, thousandth * MB // 10))
    assert terminal.getvalue().count("\r") <= 10


def test_a_bar_without_progress_leaves_no_trace() -> None:
    terminal = io.StringIO()
    with ProgressBar(terminal):
        pass
    assert terminal.getvalue() == ""


def test_a_display_is_an_observer() -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, every=0)
    for event in (
        PullBegan("target"),
        BlocksVerified(MB, 100 * MB, 1.0, "10.0.0.7:19374", session=1, blocks=1, nbytes=MB),
        PullEnded(2.0),
    ):
        log(event)
    assert lines == ["pulled 1.00 MB of 100 MB (1%), 1.00 MB/s, 1:39 left"]
