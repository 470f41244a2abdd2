"""A transport of another package, found through its entry point in a separate process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.preloaded import PYTHON
from tests.support import with_plugins

PROGRAM = """
import anyio
from netloader.transports import registry
from netloader.transports.conformance import TensorBlockView, pair_maker

async def main():
    transport = registry.available("cpu", "held").transports[0]
    into = [TensorBlockView.zeros(number, 4) for number in range(4)]
    async with pair_maker(transport)() as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, [TensorBlockView(number, [bytes([number + 1] * 4)]) for number in range(4)])
        await client.recv(into, lambda block: print(block.number, block.data.hex(), flush=True))

print("auto:", *[transport.name for transport in registry.available("cpu").transports], flush=True)
anyio.run(main)
"""


def test_held_waits_for_its_file_and_injects_the_faults(tmp_path: Path) -> None:
    file = tmp_path / "go on"
    environment = with_plugins(
        os.environ, NETLOADER_TEST_HOLD="1", NETLOADER_TEST_FILE=str(file), NETLOADER_TEST_FAULT="corrupt:3:2"
    )
    with subprocess.Popen([PYTHON, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        auto = process.stdout.readline().split()
        assert "held" not in auto, "plugins are used by name only"
        assert [process.stdout.readline().strip() for _ in range(2)] == ["0 01010101", "1 02020202"]
        file.touch()
        assert process.stdout.read().split("\n") == ["2 03030303", "3 04040504", ""]
        assert process.wait(30) == 0
