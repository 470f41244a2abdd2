"""OUTPUT_PREFIX into a folder that does not exist is found when the worker starts, not after the load."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader.vllm.serve.address_file import AddressFile


def test_a_folder_that_is_not_there_is_logged_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AddressFile(f"{tmp_path}/none/rank-", 3)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert f"rank 3: cannot write the address file {tmp_path}/none/rank-3.txt: {tmp_path}/none is not there" in (
        record.getMessage()
    )
    assert "OUTPUT_PREFIX must name a folder that exists" in record.getMessage()


def test_a_folder_that_can_be_written_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AddressFile(f"{tmp_path}/rank-", 0)
    assert caplog.records == []
