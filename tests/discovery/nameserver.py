"""A real dnsmasq on a loopback port, whose records a test changes."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest

from netloader.core.addresses import Address

__all__ = ["DNSMASQ", "NameServer", "needs_dnsmasq"]

DNSMASQ = shutil.which("dnsmasq", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")

needs_dnsmasq = pytest.mark.skipif(DNSMASQ is None, reason="needs dnsmasq (the system's package dnsmasq-base)")

DOMAIN = "fleet.test"


class NameServer:
    """Answers for the domain ``fleet.test`` only, and says that other names in it do not exist.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, folder: Path, *, ttl: int = 1, services: Iterable[str] = ()) -> None:
        if DNSMASQ is None:
            raise FileNotFoundError("dnsmasq")
        self.address = Address("127.0.0.1", _free_port())
        self._hosts = folder / "hosts"
        self._turn = 0
        self._hosts.write_text(f"127.0.0.1 turn-0.{DOMAIN}\n")
        self._log = folder / "dnsmasq.log"
        options = {
            "conf-file": "/dev/null",
            "port": str(self.address.port),
            "listen-address": "127.0.0.1",
            "local": f"/{DOMAIN}/",
            "addn-hosts": str(self._hosts),
            "local-ttl": str(ttl),
            "pid-file": str(folder / "dnsmasq.pid"),
            "user": "root",
        }
        flags = ["keep-in-foreground", "bind-interfaces", "no-resolv", "no-hosts", "no-poll", "cache-size=0"]
        self._command = [DNSMASQ, *(f"--{flag}" for flag in flags), *(f"--{k}={v}" for k, v in options.items())]
        self._command += [f"--srv-host={service}" for service in services]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self._wait_for(f"turn-{self._turn}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """It does not answer, and its port stays open."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def set(self, **hosts: Iterable[str]) -> None:
        """The addresses of each host of the domain; ``__`` stands for a dot, ``_`` for a hyphen."""
        lines = [
            f"{address} {name.replace('__', '.').replace('_', '-')}.{DOMAIN}"
            for name, addresses in hosts.items()
            for address in addresses
        ]
        self._turn += 1
        lines.append(f"127.0.0.1 turn-{self._turn}.{DOMAIN}")
        self._hosts.write_text("".join(f"{line}\n" for line in lines))
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)
            self._wait_for(f"turn-{self._turn}")

    def _wait_for(self, host: str) -> None:
        """Wait until it knows a host of the domain."""
        deadline = time.monotonic() + 30.0
        while not self._knows(host):
            stopped = self._process is None or self._process.poll() is not None
            if stopped or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"dnsmasq does not answer: {self._log.read_text()}")

    def _knows(self, host: str) -> bool:
        labels = [host, *DOMAIN.split(".")]
        name = b"".join(bytes([len(label)]) + label.encode() for label in labels)
        question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + name + b"\x00\x00\x01\x00\x01"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(0.2)
            try:
                asking.connect((self.address.host, self.address.port))
                asking.send(question)
                answer = asking.recv(512)
            except OSError:
                answer = b""
        if answer[6:8] == b"\x00\x01":  # one record
            return True
        time.sleep(0.02)
        return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
