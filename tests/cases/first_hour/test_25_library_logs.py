"""The library's log: an address once per error, no reason where nothing is wrong, each line findable by one word."""

from __future__ import annotations

import logging

import pytest
import torch

import netloader
from netloader.errors import NoSourceLeft
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
