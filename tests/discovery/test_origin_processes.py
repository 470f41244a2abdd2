"""Eight processes that start together over one Redis: one reads storage, also when the origin is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.discovery.services import Service
from tests.preloaded import PYTHON

pytest.importorskip("redis", reason="needs the redis extra")

from tests.discovery import origin_main

PROCESSES = 8
PATIENCE = 240.0


@contextmanager
def engine(service: Service, file: Path, reads: Path, moment: str) -> Iterator[subprocess.Popen[str]]:
    url = f"redis://{service.address}?prefix={file.parent.name}"
    process = subprocess.Popen(
        [PYTHON, "-m", "tests.discovery.origin_main", url, str(file), str(reads), moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("moment", ["", "before", "after", "serving"])
def test_storage_is_read_once_and_once_more_if_the_origin_is_killed(
    moment: str, redis_server: Service, tmp_path: Path
) -> None:
    file, reads = tmp_path / "model.safetensors", tmp_path / "reads"
    origin_main.make(file)
    reads.touch()
    with ExitStack() as stack:
        first = stack.enter_context(engine(redis_server, file, reads, moment))
        if moment:  # so that it is the origin
            assert first.stdout is not None
            said = first.stdout.readline()
            assert (said, first.wait(PATIENCE)) == ("loaded exact\n" if moment == "serving" else "", -9)
        others = [stack.enter_context(engine(redis_server, file, reads, "")) for _ in range(PROCESSES - 1)]
        alive = others if moment else [first, *others]
        said_by = [process.stdout.readline() for process in alive if process.stdout is not None]
    assert sorted(said_by) == sorted(["loaded exact\n", *["pulled exact\n"] * (len(alive) - 1)])
    earlier = {"": 0, "before": 0, "after": 1, "serving": 1}[moment]
    assert len(reads.read_text(encoding="ascii").splitlines()) == 1 + earlier
