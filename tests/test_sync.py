"""The synchronous API: how a waiting call ends."""

from __future__ import annotations

import os
import signal
import socket
import threading

import anyio
import pytest
import torch

from netloader import NetloaderError, api, sync

WAIT = 30.0


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("netloader")]


def test_an_interrupt_ends_the_pull_and_its_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        met = threading.Event()
        left: list[bytes] = []

        def interrupt() -> None:
            client, _ = mute.accept()
            with client:
                client.settimeout(WAIT)
                assert client.recv(1), "the client says hello"
                met.set()
                os.kill(os.getpid(), signal.SIGINT)
                while said := client.recv(4096):
                    left.append(said)
                left.append(b"")

        helper = threading.Thread(target=interrupt)
        helper.start()
        source = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(KeyboardInterrupt):
            sync.pull({"w": torch.zeros(4)}, sources=[source], transport="memory", timeout=WAIT)
        assert threads() == [], "nothing is left when the call has ended"
        helper.join(WAIT)
    assert met.is_set()
    assert left[-1] == b"", "the connection was closed"


@pytest.mark.allow_blocking(reason="a loop that hangs is what is looked at")
def test_an_interrupt_ends_the_call_even_if_the_loop_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go, hanging = threading.Event(), list[threading.Thread]()

    async def hangs(*_: object, **__: object) -> None:
        hanging.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGINT)
        assert go.wait(WAIT)

    monkeypatch.setattr(api, "pull", hangs)
    monkeypatch.setattr(sync, "_LOOP_END", 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            sync.pull({"w": torch.zeros(4)}, sources=[])
        assert "thread netloader-pull did not end within 0.05 s" in caplog.text
    finally:
        go.set()
        hanging[0].join(WAIT)


def test_an_interrupt_while_the_thread_starts_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    async def waits(*_: object, **__: object) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "pull", waits)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sync.pull({"w": torch.zeros(4)}, sources=[])
    assert cancelled.is_set()
    assert threads() == []


def test_an_error_is_raised_to_the_caller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        source = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(NetloaderError, match=source):
        sync.pull({"w": torch.zeros(4)}, sources=[source], transport="memory")
    assert threads() == []


def test_invalid_arguments_are_errors_of_the_call() -> None:
    with pytest.raises(TypeError):
        sync.pull({"w": torch.zeros(4)}, surces=["127.0.0.1:1"])  # type: ignore[call-arg]
    assert threads() == []
