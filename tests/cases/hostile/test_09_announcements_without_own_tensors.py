"""An announcement read by a client that has no tensors to compare it with: bounded in memory, time and calls into C.

Measured with the frames below, on two processors, before and after: 1,000,000 tensors of 64 sizes and strides (145
MiB) were refused after 2.8 s, held other threads up for 1.05 s at a time, and took 408 MiB of memory; now they are
refused by their length. 1,000,000 usual tensors held threads up for 0.54 s and took 619 MiB. Now 500,000 are the most;
decoding them holds threads up for 12 ms, and takes 239 MiB (a whole probe). The worst of these frames takes 322 MiB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from functools import partial

import anyio
import msgspec
import pytest

from netloader.codecs import frames
from netloader.codecs.announcements import decode_in_parts
from netloader.codecs.frames import LARGE_FRAME, SERVER_FRAME_CAP
from netloader.core import messages as m
from netloader.core.manifest import MAX_TENSORS, Manifest, TensorSpec
from netloader.errors import NetloaderError, RemoteProtocolError
from tests.drivers import kit
from tests.drivers.test_completion import HUB

GIL_SECONDS = 0.05
"""Most processor time of one step, in which no call into C can last longer."""

TRIES = 3

NAME = "model.layers.{0}.mlp.experts.{0}.down_proj.weight_packed"
LONGEST = "\U00010000{:06d}" + "n" * 960
"""A name that takes four bytes of memory for each byte of the frame."""


def announced(count: int, spec: Callable[[int], TensorSpec]) -> bytes:
    """The body of an announcement of so many tensors, with a root that is wrong."""
    manifest = Manifest(tuple(map(spec, range(count))))
    return m.wire_body(
        m.Announce(manifest=manifest, block_bytes=1 << 30, algorithm="x", digests=b"", root="00", plan="00")
    )


def usual(number: int) -> TensorSpec:
    return TensorSpec(NAME.format(number), "int32", (7168, 256))


def deep(number: int) -> TensorSpec:
    return TensorSpec(f"t{number}", "uint8", (1,) * 64, (300,) * 64)


def long_names(number: int) -> TensorSpec:
    return TensorSpec(LONGEST.format(number), "int32", (7168, 256))


def short(number: int) -> TensorSpec:
    return TensorSpec(f"t{number}", f"d{number}", (300, 300), (300, 300), f"f{number}", f"a{number}")


HOSTILE = {
    "the most tensors": partial(announced, 500_000, usual),
    "deep": partial(announced, 120_000, deep),
    "long names": partial(announced, 49_000, long_names),
    "many words": partial(announced, MAX_TENSORS, short),
}


@pytest.fixture(params=list(HOSTILE), scope="module")
def body(request: pytest.FixtureRequest) -> bytes:
    made = HOSTILE[request.param]()
    assert LARGE_FRAME < len(made) <= SERVER_FRAME_CAP
    return made


def test_no_step_of_decoding_holds_other_threads_up(body: bytes) -> None:
    longest: list[float] = []  # of each try: what else runs on this machine makes steps longer, never shorter
    while not longest or min(longest) >= GIL_SECONDS:
        assert len(longest) < TRIES, f"seconds of the longest step: {longest}"
        longest.append(longest_step(body))


def longest_step(body: bytes) -> float:
    """Seconds of the longest step of decoding."""
    steps = decode_in_parts(body, msgspec.msgpack.Decoder(m.Announce).decode)
    seconds: list[float] = []
    ends: list[Exception] = []  # kept, so that freeing the tensors is not measured
    while not ends:
        began = time.thread_time()
        try:
            next(steps)
        except (StopIteration, RemoteProtocolError) as end:
            ends.append(end)
        seconds.append(time.thread_time() - began)
    assert len(seconds) >= 10
    return max(seconds)


PROBE = """
import sys
from pathlib import Path
import anyio
import netloader
from netloader import api
from netloader.errors import NetloaderError

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

async def main():
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    try:
        await api.probe(sys.argv[1], layouts=("raw",))
    except NetloaderError as error:
        print(kilobytes("VmHWM") - before >> 10, error.message)

anyio.run(main)
"""


async def probed(script: kit.ServerScript) -> tuple[int, str]:
    """What a probe of a server with this script costs in MiB of memory, and its error."""
    async with kit.fake_server(script) as fake:
        with anyio.fail_after(kit.PATIENCE):
            done = await anyio.run_process([sys.executable, "-c", PROBE, str(fake.address)])
    cost, _, message = done.stdout.decode().partition(" ")
    return int(cost), message.strip()


async def until_announced(wire: kit.Wire[m.ClientMessage]) -> None:
    await wire.hear_until(m.Hello)
    await wire.say(kit.welcome(HUB.transport))
    await wire.hear_until(m.Identify)
    await wire.say(m.Accepted(identity=kit.IDENTITY))


async def test_the_memory_of_an_announcement_is_limited(body: bytes) -> None:
    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await until_announced(wire)
        await wire.raw(len(body).to_bytes(4, "big") + body)
        await wire.closed()

    cost, message = await probed(script)
    assert cost < 400, f"{cost} MiB"
    assert "different blocks" in message or "sizes and strides" in message or "unusable" in message


async def test_a_longer_frame_is_refused_by_its_length() -> None:
    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await until_announced(wire)
        await wire.raw((158 << 20).to_bytes(4, "big"))
        await wire.closed()

    cost, message = await probed(script)
    assert cost < 40, "MiB"
    assert f"at most {SERVER_FRAME_CAP} are accepted" in message


async def test_decoding_ends_with_the_deadline_of_the_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def without_end(_body: object, _decode: object) -> Generator[None, None, m.Announce]:
        nonlocal steps
        while True:
            steps += 1
            time.sleep(0.01)
            yield

    monkeypatch.setattr(frames, "decode_in_parts", without_end)
    body = announced(20_000, usual)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await until_announced(wire)
        await wire.raw(len(body).to_bytes(4, "big") + body)
        await wire.closed()

    async with kit.fake_server(script) as fake:
        with anyio.fail_after(kit.PATIENCE), pytest.raises(NetloaderError):
            await kit.pull(kit.blank(kit.weights()), [fake.address], HUB.transport, timeout=0.5)
    assert steps > 1
    ended = steps
    await anyio.sleep(0.05)
    assert steps == ended
