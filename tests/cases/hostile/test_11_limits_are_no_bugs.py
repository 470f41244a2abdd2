"""A limit or a missing part of the host is named as such, and not as a bug of this package."""

from __future__ import annotations

import errno
import threading

import pytest
import torch

import netloader
from netloader.errors import TransportError, remedy_for
from netloader.transports import base
from netloader.transports.tcp import TcpTransport

THREADS = RuntimeError("can't start new thread")
PROC = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/self/net/tcp")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (THREADS, "raise the limit of threads"),
        (PROC, "mount /proc"),
        (MemoryError(), "free memory"),
        (OSError(errno.EMFILE, "Too many open files"), "limit of open files"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "this host refused it"),
    ],
)
def test_an_error_of_the_host_has_a_remedy(error: BaseException, hint: str) -> None:
    assert hint in remedy_for(error)


@pytest.mark.parametrize("error", [RuntimeError("other"), KeyError("a"), ZeroDivisionError()])
def test_a_bug_has_none(error: BaseException) -> None:
    assert remedy_for(error) == ""


class Limited(TcpTransport):
    """A transport on a host that lacks something."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def connect(self, offer: bytes, setup: base.Setup) -> base.Channel:
        raise self._error


@pytest.mark.parametrize(("error", "hint"), [(THREADS, "raise the limit of threads"), (PROC, "mount /proc")])
async def test_a_pull_that_meets_it_says_what_to_do(error: Exception, hint: str) -> None:
    async with netloader.Server({"w": torch.zeros(4)}, host="127.0.0.1", transport="tcp") as server:
        with pytest.raises(netloader.NoSourceLeft) as caught:
            await netloader.pull_new(sources=[server.address], transport=Limited(error))
    (attempt,) = caught.value.attempts
    assert hint in attempt.hint
    assert "bug in netloader" not in str(caught.value)


@pytest.mark.allow_blocking(reason="the thread of the blocking call is what cannot be started")
def test_the_blocking_side_meets_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError(*THREADS.args)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(TransportError, match="can't start another thread") as caught:
        netloader.sync.pull({"w": torch.zeros(4)}, sources=["127.0.0.1:1"])
    assert "raise the limit of threads" in caught.value.hint
