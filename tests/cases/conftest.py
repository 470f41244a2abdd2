"""The command line configures the log of the process that calls it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands import untouched_logging


@pytest.fixture(autouse=True)
def logging_stays() -> Iterator[None]:
    with untouched_logging():
        yield
