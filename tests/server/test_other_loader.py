"""A client of vllm-ascend's own loader at our port is told what to do, and costs nobody else anything."""

from __future__ import annotations

import json
import logging

import anyio
import pytest
import torch

import netloader
from netloader.codecs.frames import encode_frame
from netloader.codecs.vllm_ascend import NO_JOIN
from netloader.core.greeting import READ_AT_MOST
from netloader.server.newcomers import TURNED_AWAY

HOST = "127.0.0.1"
IDENTITY = netloader.ModelIdentity(model="m")
JOIN = json.dumps(
    {"label": "JOIN", "content": {"device_id": 0, "model_path": "m", "tp": 1, "pp": 1, "port": 1, "group_name": "g"}}
).encode()


async def answer(port: int, said: bytes) -> bytes:
    """What the server says before it closes."""
    async with await anyio.connect_tcp(HOST, port) as stream:
        await stream.send(said)
        heard = b""
        with anyio.fail_after(10):
            try:
                while True:
                    heard += await stream.receive()
            except anyio.EndOfStream:
                return heard


@pytest.mark.parametrize("token", [None, b"a token of both sides"], ids=["open", "token"])
async def test_its_client_is_refused_in_its_own_words_and_ours_are_served(
    token: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"w": torch.arange(4.0)}
    async with netloader.Server(weights, IDENTITY, host=HOST, transport="tcp", token=token) as server:
        with caplog.at_level(logging.INFO, logger="netloader"):
            heard = await answer(server.port, JOIN)
        assert len(heard) <= READ_AT_MOST, "it reads no more"
        said = json.loads(heard)
        assert said["label"] == "JOIN_NACK"
        assert "run `pip install netloader` beside this vllm-ascend" in said["content"]
        assert "it is a client of vllm-ascend's own loader" in caplog.text
        target = {"w": torch.zeros(4)}
        sources = [f"{HOST}:{server.port}"]
        await netloader.pull(target, IDENTITY, sources=sources, transport="tcp", token=token)
        assert torch.equal(target["w"], weights["w"])


async def test_a_server_that_turned_a_client_away_is_not_asked_what_it_is() -> None:
    """With a token its answer counts for nothing, because anybody could have said it."""
    asked: list[bytes] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive())
            await stream.send(encode_frame(TURNED_AWAY))

    async with await anyio.create_tcp_listener(local_host=HOST) as listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, serve)
        with pytest.raises(netloader.PeerLost, match="before it proved that it knows the token"):
            await netloader.probe(f"{HOST}:{port}", token=b"a token of both sides")
        assert len(asked) == 1
        tasks.cancel_scope.cancel()


async def test_a_source_that_closes_without_a_word_is_asked_once_what_it_is() -> None:
    """It may be anything. One that answers as vllm-ascend's server does is named, any other is not."""
    asked: list[bytes] = []
    answers = {b"\0": b"", b"{": b'{"label": "JOIN_NACK", "content": "Received data does not contain required fields"}'}

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive())
            if reply := answers[asked[-1][:1]]:
                await stream.send(reply)

    async def probed() -> str:
        with pytest.raises(netloader.PeerLost) as caught:
            await netloader.probe(f"{HOST}:{port}")
        return str(caught.value)

    async with await anyio.create_tcp_listener(local_host=HOST) as listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, serve)
        assert "a server of vllm-ascend's own loader" in await probed()
        assert asked[1:] == [b"{}"]
        answers[b"{"] = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        assert "the peer closed the control connection" in await probed()
        answers[b"{"] = NO_JOIN
        assert "the peer closed the control connection" in await probed(), "a server of ours is not taken for one"
        answers[b"{"] = b""
        assert "the peer closed the control connection" in await probed()
        tasks.cancel_scope.cancel()
