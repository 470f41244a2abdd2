"""The two loaders at each other's port: neither does the other harm, and users read what they have to change."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import torch

import netloader
from netloader.core import messages as m
from tests.hccl.processes import ROOT, clean_environment

FAKES = ROOT / "tests" / "npu_sim" / "fakes"
PEER = Path(__file__).parent / "elastic_peer.py"
IDENTITY = netloader.ModelIdentity(model="a model")
SECONDS = 120


def command(*arguments: str) -> dict[str, Any]:
    environment = clean_environment({"VLLM_PLUGINS": "none", "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)])})
    return {"args": [sys.executable, "-W", "ignore", str(PEER), *arguments], "env": environment, "cwd": ROOT}


class Elastic:
    """The server of vllm-ascend, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._answer()["port"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise AssertionError("its process ended")

    def accepts(self) -> bool:
        """Whether the thread that accepts its connections lives."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return bool(self._answer()["alive"])


@pytest.fixture
def elastic() -> Iterator[Elastic]:
    with subprocess.Popen(
        **command("serve"), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield Elastic(process)
        finally:
            process.kill()


def join(port: int, model: str = "a model") -> tuple[bool, str]:
    """Whether the client of vllm-ascend was accepted at this port, and what it logged."""
    done = subprocess.run(
        **command("join", f"127.0.0.1:{port}", model), check=False, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return bool(json.loads(done.stdout.splitlines()[-1])["joined"]), done.stdout + done.stderr


def pull(port: int, **options: Any) -> netloader.PullReport:
    return netloader.sync.pull(
        {"w": torch.zeros(4)}, identity=IDENTITY, sources=[f"127.0.0.1:{port}"], transport="tcp", **options
    )


def test_a_pull_from_its_server_does_no_harm_and_says_what_it_is(elastic: Elastic) -> None:
    with pytest.raises(netloader.NetloaderError, match="a server of vllm-ascend's own loader"):
        pull(elastic.port)
    assert elastic.accepts()
    joined, logged = join(elastic.port, "another model")
    assert not joined
    assert "does not consist with this server" in logged, "its next client is answered"


def test_a_probe_of_its_server_does_no_harm_and_says_what_it_is(elastic: Elastic) -> None:
    for _ in range(3):
        with pytest.raises(netloader.NetloaderError, match="a server of vllm-ascend's own loader") as caught:
            netloader.sync.probe(f"127.0.0.1:{elastic.port}")
        assert "start the source with the package netloader" in caught.value.hint
    assert elastic.accepts()


def test_a_first_message_without_the_texts_ends_its_server(elastic: Elastic) -> None:
    """The control: what happens without the precaution."""

    body = msgspec.msgpack.encode(m.Hello(protocol=1, nonce=bytes(range(240, 256))))
    with socket.create_connection(("127.0.0.1", elastic.port), timeout=SECONDS) as sock:
        sock.sendall(len(body).to_bytes(4, "big") + body)
        until = time.monotonic() + SECONDS
        while elastic.accepts() and time.monotonic() < until:
            time.sleep(0.1)
    assert not elastic.accepts()


async def test_its_client_at_our_server_reads_what_to_do() -> None:
    async with netloader.Server({"w": torch.ones(4)}, IDENTITY, host="127.0.0.1", transport="tcp") as server:
        joined, logged = await anyio.to_thread.run_sync(join, server.port)
        assert not joined
        assert "pip install netloader" in logged
        target = {"w": torch.zeros(4)}
        await netloader.pull(target, identity=IDENTITY, sources=[f"127.0.0.1:{server.port}"], transport="tcp")
        assert torch.equal(target["w"], torch.ones(4)), "our clients are served as before"
