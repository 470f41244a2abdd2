"""The library's log: an address once per error, no reason where nothing is wrong, each line findable by one word."""

from __future__ import annotations

import argparse
import logging

import anyio
import pytest
import torch

import netloader
from netloader.cli.console import say, set_up_logging
from netloader.core import pull_clock
from netloader.core.texts import LINE
from netloader.errors import NoSourceLeft
from netloader.observe import Event, Observer, SourceWaiting, TransportChosen
from netloader.observe.progress import ProgressLog
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from netloader.transports.tcp import TcpTransport
from netloader.vllm.logs import join_vllm_log


async def test_an_error_names_each_address_once(free_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netloader")
    source = f"127.0.0.1:{free_tcp_port}"
    with pytest.raises(NoSourceLeft) as caught:
        await netloader.pull({"w": torch.zeros(1)}, sources=[source], transport="tcp")
    assert caught.value.message == f"no source could be pulled from: {source}: cannot be reached: Connection refused"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"source {source}: cannot be reached: Connection refused (")
    assert (line.count("127.0.0.1"), line.count(str(free_tcp_port))) == (1, 1)


async def test_a_transport_that_is_only_less_preferred_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netloader")
    weights = {"w": torch.arange(10)}
    async with netloader.Server(weights, host="127.0.0.1", transport=["memory", "tcp"]) as server:
        await netloader.pull_new(sources=[server.address], transport=["memory", "tcp"])
    assert [line for line in caplog.messages if ": transport " in line] == [
        f"source {server.address}: transport memory"
    ]


def test_each_line_in_the_log_of_vllm_can_be_found_by_one_word(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = logging.getLogger("netloader"), logging.getLogger("vllm")
    before = ours.handlers[:], ours.propagate, ours.level
    ours.handlers[:] = []
    try:
        join_vllm_log()
        caplog.set_level(logging.INFO, "vllm")
        ours.info("source %s: transport %s", "10.0.0.7:19374", "tcp")
        ours.info("netloader: %s", "100% done")
        logging.getLogger("netloader.transports").warning("100% of it")
    finally:
        ours.handlers[:], ours.propagate = before[:2]
        ours.setLevel(before[2])
    assert theirs.handlers == [] or theirs.propagate
    assert [record.getMessage() for record in caplog.records] == [
        "netloader: source 10.0.0.7:19374: transport tcp",
        "netloader: 100% done",
        "netloader: 100% of it",
    ]


def test_each_line_in_the_log_of_a_command_can_be_found_by_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("netloader")
    before = log.handlers[:], log.propagate, log.level
    try:
        set_up_logging(argparse.Namespace(log_level="info"))
        log.info("serving %s", "me/tiny")
        log.warning("netloader serves at %s", "[::]:19374")
        say("left out: vae/model.safetensors", to_stderr=True)
        say("netloader: hint: none", to_stderr=True)
        say("verified: all tensors bit-exact")
    finally:
        log.handlers[:], log.propagate = before[:2]
        log.setLevel(before[2])
    out, err = capsys.readouterr()
    assert out == "verified: all tensors bit-exact\n"
    assert [line.partition(" INFO ")[2] or line.partition(" WARNING ")[2] or line for line in err.splitlines()] == [
        "netloader: serving me/tiny",
        "netloader serves at [::]:19374",
        "netloader: left out: vae/model.safetensors",
        "netloader: hint: none",
    ]


async def test_a_pull_logs_one_line_about_what_was_pulled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netloader")
    weights = {"w": torch.arange(100_000)}
    async with netloader.Server(weights, host="127.0.0.1", transport="tcp") as server:
        await netloader.pull_new(sources=[server.address], transport="tcp")
        (first,) = [line for line in caplog.messages if "pulled" in line]
        caplog.clear()
        lines: list[str] = []
        progress = ProgressLog(lines.append, every=0, last=False)
        await netloader.pull_new(sources=[server.address], transport="tcp", progress=progress)
    assert first.startswith("netloader: pulled 800 kB (target, 1 tensor) in ")
    assert not [line for line in caplog.messages if "pulled" in line], "who shows progress sums up as it likes"
    assert not [line for line in lines if "(100%)" in line]


async def test_a_line_about_a_source_that_is_left_is_short(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netloader")
    async with netloader.Server(host="127.0.0.1", transport="tcp") as server:
        server.expect("target", "raw", reason="r" * 700)
        with pytest.raises(NoSourceLeft) as caught:
            await netloader.pull_new(sources=[server.address], transport="tcp")
    assert "r" * 700 in str(caught.value), "the error has all of it"
    assert caplog.messages
    assert all(len(line) <= LINE for line in caplog.messages)


@pytest.mark.usefixtures("turns_stay")
async def test_a_client_in_a_queue_says_its_place_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_clock, "_SAY_EVERY", 0.05)
    waits: list[SourceWaiting] = []
    told, accepted = anyio.Event(), anyio.Event()

    def watch(event: Event) -> None:
        if isinstance(event, SourceWaiting) and event.reason.endswith("turns are taken"):
            waits.append(event)
            told.set()

    def hold_turn(event: Event) -> None:
        if isinstance(event, TransportChosen):
            accepted.set()

    weights = {"w": torch.arange(1000)}
    slow = FaultyTransport(TcpTransport(), Faults([Fault(FaultKind.STALL, 0)]))
    async with (
        netloader.Server(weights, host="127.0.0.1", transport=[slow], max_clients=1) as server,
        anyio.create_task_group() as tasks,
    ):

        async def pull(observer: Observer) -> None:
            await netloader.pull_new(sources=[server.address], transport="tcp", observers=[observer])

        tasks.start_soon(pull, hold_turn)
        await accepted.wait()
        tasks.start_soon(pull, watch)
        with anyio.fail_after(20):
            await told.wait()
        tasks.cancel_scope.cancel()
    assert str(waits[0]).startswith(f"waiting for {server.address}: number 1 in its queue: all 1 turns are taken, ")
    assert str(waits[0]).endswith(" of 1200 s")
