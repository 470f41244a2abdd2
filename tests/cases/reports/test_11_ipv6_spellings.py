"""IPv6 hosts may stand in brackets and may have a zone, for servers and for sources, over every transport."""

from __future__ import annotations

import pytest

from tests.cases.networks import PAIR, run_in_network

QUIET = ["link set v0 addrgenmode none", "link set v1 addrgenmode none"]
ADDRESSES = ["-6 addr add fe80::77/64 dev v0 nodad", "-6 addr add fd77::1/64 dev v0 nodad"]
PROGRAM = """\
weights = {{"w": torch.arange(1000)}}
for host in ("[fd77::1]", "fe80::77%v0", "[fe80::77%v0]"):
    with netloader.sync.serve(weights, host=host, transport={transport!r}) as server:
        into = {{"w": torch.zeros(1000, dtype=torch.int64)}}
        source = str(server.address)
        report = netloader.sync.pull(into, sources=[source], transport={transport!r}, timeout=60)
        print(source.rpartition(":")[0], torch.equal(into["w"], weights["w"]), *(s.transport for s in
              report.sources.values()))
"""


@pytest.mark.parametrize("transport", ["tcp", "shm", "gloo", "memory"])
def test_brackets_and_zones_work(transport: str) -> None:
    lines, log = run_in_network([*PAIR, *ADDRESSES], PROGRAM.format(transport=transport))
    assert lines == [
        f"[fd77::1] True {transport}",
        f"[fe80::77%v0] True {transport}",
        f"[fe80::77%v0] True {transport}",
    ]
    assert "Traceback" not in log


def test_the_command_line_takes_them() -> None:
    program = """\
import threading, time
from netloader.cli import main
from pathlib import Path
import safetensors.torch, tempfile
with tempfile.TemporaryDirectory() as folder:
    model, file = Path(folder, "model"), Path(folder, "address")
    model.mkdir()
    safetensors.torch.save_file({"w": torch.arange(10)}, model / "model.safetensors")
    read, write = os.pipe()
    os.dup2(read, 0)
    def pull():
        while not file.exists():
            time.sleep(0.005)
        print("address", file.read_text().rpartition(":")[0])
        os.close(write)
    thread = threading.Thread(target=pull)
    thread.start()
    main(["serve", str(model), "--host", "[fe80::77%v0]", "--stop-on-eof", "--address-file", str(file)])
    thread.join()
"""
    lines, _ = run_in_network([*PAIR, *ADDRESSES], program)
    assert "address [fe80::77%v0]" in lines
