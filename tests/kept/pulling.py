"""Runs `netloader.pull` against sources that follow scripts, and tells what it did: the trace of its decisions.

A trace holds whom the client connected to in which order, what it told each source in which order, how each session
ended and what the caller got. Left out is what depends on the moment: random bytes, ports, seconds, and how often a
session asked for more (requests in a row are one).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import msgspec
import torch
from anyio.abc import SocketAttribute, SocketStream

import netloader
from tests.kept import by_hand
from tests.kept.by_hand import DataPort, Message, Weights, Wire

__all__ = ["Scenario", "Step", "trace_of"]

Step = str | tuple[str, Any]
"""What a source does next: the name of a method of `Session`, and its argument."""

MODEL = "kept"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Scenario:
    """Sources and a pull.

    Attributes:
        sources: Name -> the scripts of its sessions in order; the last one is followed by all later sessions. A source
            without a script refuses connections.
        given: Names of those that the pull is given, in order; None for all.
        loose: Sources of which it is not told how their sessions end, since the pull has all it needs by then.
        pull: Further arguments of `netloader.pull`; with ``expect`` the seed of the weights that are required, with
            ``relay`` true for a server of this process that passes on, with ``adopt`` true for `netloader.pull_new`,
            with ``probe`` true for `netloader.probe` of the first source.
        rows: Blocks of the large tensor.
        block_bytes: Their size.
        shares: Whether it is told who gave how much, and what was asked for after the first request.
    """

    sources: Mapping[str, Sequence[Sequence[Step]]]
    given: Sequence[str] | None = None
    loose: Sequence[str] = ()
    pull: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 12
    block_bytes: int = 1024
    shares: bool = True


class Left(Exception):
    """The client has ended the session, or does something else than the script expects."""


class Play:
    """A scenario that is being played."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._weights = [Weights(seed, scenario.rows, scenario.block_bytes) for seed in (0, 1)]
        self.connects: list[str] = []
        self.sessions: dict[str, list[Session]] = {name: [] for name in scenario.sources}
        self.ports: dict[str, int] = {}
        self.verified_bytes = 0
        self._marks: dict[str, anyio.Event] = {}

    def weights(self, seed: int) -> Weights:
        return self._weights[seed]

    def seed_of(self, root: str) -> int | None:
        """Whose root it is."""
        return next((seed for seed, weights in enumerate(self._weights) if weights.root == root), None)

    def mark(self, name: str) -> anyio.Event:
        return self._marks.setdefault(name, anyio.Event())

    def address(self, name: str) -> str:
        return f"{HOST}:{self.ports[name]}"

    def plain(self, text: str) -> str:
        """A text with the names of sources in place of their addresses."""
        for name, port in self.ports.items():
            text = text.replace(f"{HOST}:{port}", f"<{name}>").replace(f"('{HOST}', {port})", f"<{name}>")
        return text


class Session:
    """One session at a source."""

    def __init__(self, play: Play, name: str, stream: SocketStream) -> None:
        self.play = play
        self.name = name
        self.weights = play.weights(0)
        self.heard: list[Message] = []
        self.over = anyio.Event()
        self._wire = Wire(stream)
        self._data: DataPort | None = None
        self._hello: Message = {}
        self._identify: Message = {}
        self._wanted: list[int] = []

    async def follow(self, script: Sequence[Step]) -> None:
        try:
            for step in script:
                name, argument = (step, None) if isinstance(step, str) else step
                await getattr(self, name)(argument)
            await self.hear_out()
        except (Left, anyio.EndOfStream, anyio.BrokenResourceError):
            pass
        finally:
            self.over.set()
            self.play.mark(f"{self.name}:over {self.play.sessions[self.name].index(self) + 1}").set()
            if self._data is not None:
                self._data.close()

    async def hear(self, kind: str) -> Message:
        message = await self._wire.hear()
        self.heard.append(self._noted(message))
        self.play.mark(f"{self.name}:{message['type']}").set()
        if message["type"] == kind:
            return message
        await self._answer(message)
        await self.hear_out()
        raise Left

    async def hear_out(self) -> None:
        """Hear what still comes, until the client leaves."""
        while True:
            message = await self._wire.hear()
            self.heard.append(self._noted(message))
            self.play.mark(f"{self.name}:{message['type']}").set()
            await self._answer(message)

    async def _answer(self, message: Message) -> None:
        """What has to be said to a message that is always in order."""
        if message["type"] == "Verdict":
            await self._wire.say("Goodbye")

    def _noted(self, message: Message) -> Message:
        """What of a message a trace tells."""
        noted = dict(message)
        for name in ("nonce", "proof", "node", "relay"):
            if name in noted:
                noted[name] = "..."
        if "software" in noted:
            assert re.fullmatch(r"netloader \d\S*", noted.pop("software"))
        if "abilities" in noted:
            noted["abilities"] = [ability["name"] for ability in noted["abilities"]]
        for name in ("manifest", "plan", "root"):
            if name in noted:
                noted[name] = self._whose(noted[name])
        if "avoid" in noted:
            noted["avoid"] = [self.play.plain(address) for address in noted["avoid"]]
        if "ranges" in noted:
            noted["ranges"] = [list(each) for each in noted["ranges"]]
        if "reason" in noted:
            noted["reason"] = self.play.plain(noted["reason"])
        return noted

    def _whose(self, digest: str) -> str:
        if digest in {self.weights.manifest_digest, self.weights.plan_digest}:
            return "right"
        seed = self.play.seed_of(digest)
        return digest if seed is None else f"root {seed}"

    # --- steps ------------------------------------------------------------------------------------------------------

    async def hello(self, _: None) -> None:
        self._hello = await self.hear("Hello")

    async def welcome(self, changed: Message | None) -> None:
        """Hear Hello, say Welcome. A token makes the source prove that it knows it."""
        await self.hello(None)
        hello = self._hello
        token = (changed or {}).get("token")
        version = 1 if token is None else 2
        fields = {"protocol": version, "nonce": by_hand.NONCE, "abilities": hello.get("abilities", [])}
        if token is None:
            await self._wire.say("Welcome", **{**fields, **(changed or {})})
        else:
            await self._wire.welcome(token, **fields)

    async def identify(self, _: None) -> None:
        self._identify = await self.hear("Identify")

    async def wait(self, position: int) -> None:
        await self._wire.say("Waiting", reason="all turns are taken", position=position)

    async def accept(self, changed: Message | None) -> None:
        """Hear Identify unless it was heard, say Accepted and Announce; ``seed`` announces other weights."""
        if not self._identify:
            await self.identify(None)
        fields = dict(changed or {})
        self.weights = self.play.weights(fields.pop("seed", 0))
        wanted = self._identify.get("identity") or {"model": MODEL}
        await self._wire.say("Accepted", identity={**wanted, **fields.pop("identity", {})})
        known = self._identify.get("manifest") == self.weights.manifest_digest
        if fields.pop("through_client", False):
            fields |= {"node": "ab" * 8, "chain": [self._identify["node"]]}
        await self._wire.say("Announce", **{**self.weights.announcement(manifest_known=known), **fields})

    async def offer(self, _: None) -> None:
        """Hear Agree, and open the data channel."""
        await self.hear("Agree")
        self._data = DataPort(self._wire.keys.get("data", b""))
        offer = msgspec.msgpack.encode(self._data.offer)
        await self._wire.say("ChannelOffer", transport="tcp", offer=offer)
        await self._data.let_in()

    async def serve(self, _: None) -> None:
        """Give whatever is asked for until the client has had enough."""
        while True:
            await self._give(self._wanted or await self._more())

    async def give(self, count: int) -> None:
        """Give so many blocks, and wait until the client has verified them."""
        numbers = await self._next(count)
        self.play.verified_bytes += sum(len(self.weights.blocks[number]) for number in numbers)
        await self._give(numbers)
        with anyio.fail_after(by_hand.PATIENCE):
            await self.play.mark(f"verified {self.play.verified_bytes}").wait()

    async def lie(self, count: int) -> None:
        """Give blocks that differ from what was announced."""
        await self._give(await self._next(count), wrong=True)

    async def grant(self, count: int) -> None:
        """Say that blocks come, and send none."""
        await self._wire.say("Grant", ranges=by_hand.to_ranges(await self._next(count)))

    async def deny(self, what: Message) -> None:
        """Say that blocks, of those that are asked for, will not come."""
        await self._next(1)
        gone = [number for number in what["blocks"] if number in self._wanted]
        self._wanted = [number for number in self._wanted if number not in gone]
        if not gone:
            return
        sources = [self.play.address(name) for name in what.get("sources", ())]
        named = {"sources": sources} if sources else {}
        await self._wire.say("Gone", ranges=by_hand.to_ranges(gone), reason="they were freed", **named)

    async def upstream(self, what: str) -> None:
        """Tell which relays the blocks come through: the client itself, or another one."""
        chain = [self._identify["node"]] if what == "client" else ["cd" * 8]
        await self._wire.say("Upstream", chain=chain)

    async def refuse(self, what: Message | str) -> None:
        fields: Message = {"code": what} if isinstance(what, str) else dict(what)
        if "sources" in fields:
            fields["sources"] = [self.play.address(name) for name in fields["sources"]]
        await self._wire.say("Refusal", **{"message": f"no: {fields['code']}", **fields})

    async def agree(self, _: None) -> None:
        """Hear which transport the client chose, and offer nothing."""
        await self.hear("Agree")

    async def leave(self, code: str) -> None:
        await self._wire.say("Goodbye", code=code, reason="enough")

    async def say(self, message: tuple[str, Message]) -> None:
        """Say anything."""
        await self._wire.say(message[0], **message[1])

    async def raw(self, data: bytes) -> None:
        await self._wire.stream.send(data)

    async def until(self, mark: str) -> None:
        """Wait until another source has heard a message, or a session of it is over."""
        with anyio.fail_after(by_hand.PATIENCE):
            await self.play.mark(mark).wait()

    async def tell(self, mark: str) -> None:
        """What others may wait for: this one has come so far."""
        self.play.mark(f"{self.name}:{mark}").set()

    async def want(self, count: int) -> None:
        """Hear requests for so many blocks."""
        await self._next(count)

    async def cut(self, _: None) -> None:
        """End the connections without a word."""
        raise Left

    async def cut_data(self, _: None) -> None:
        """End the data channel alone."""
        assert self._data is not None
        self._data.close()

    async def _more(self) -> list[int]:
        want = await self.hear("Want")
        self._wanted += by_hand.expand(want["ranges"])
        return self._wanted

    async def _next(self, count: int) -> list[int]:
        while len(self._wanted) < count:
            await self._more()
        return self._wanted[:count]

    async def _give(self, numbers: list[int], *, wrong: bool = False) -> None:
        assert self._data is not None
        self._wanted = [number for number in self._wanted if number not in numbers]
        await self._wire.say("Grant", ranges=by_hand.to_ranges(numbers))
        data = b"".join(self.weights.blocks[number] for number in numbers)
        await self._data.send(bytes(byte ^ 1 for byte in data) if wrong else data)


# --- a run ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _listening(play: Play) -> AsyncIterator[None]:
    """All sources of a play."""

    async def handle(name: str, stream: SocketStream) -> None:
        scripts, sessions = play.scenario.sources[name], play.sessions[name]
        play.connects.append(name)
        session = Session(play, name, stream)
        sessions.append(session)
        async with stream:
            await session.follow(scripts[min(len(sessions), len(scripts)) - 1])

    async with contextlib.AsyncExitStack() as stack:
        listeners = {}
        for name, scripts in play.scenario.sources.items():
            if scripts:
                listeners[name] = await stack.enter_async_context(await anyio.create_tcp_listener(local_host=HOST))
                play.ports[name] = listeners[name].extra(SocketAttribute.local_port)
            else:
                sock = stack.enter_context(socket.socket())  # bound, and not listening: connections are refused
                sock.bind((HOST, 0))
                play.ports[name] = sock.getsockname()[1]
        async with anyio.create_task_group() as tasks:
            for name, listener in listeners.items():
                tasks.start_soon(listener.serve, partial(handle, name))
            yield
            with anyio.fail_after(by_hand.PATIENCE):
                for session in [session for sessions in play.sessions.values() for session in sessions]:
                    await session.over.wait()
            tasks.cancel_scope.cancel()


async def trace_of(scenario: Scenario) -> dict[str, Any]:
    """Play a scenario; what is to be kept of it."""
    play, lines = Play(scenario), _Lines()
    with lines:
        async with _listening(play):
            outcome = await _outcome(play)
    return {
        "connects": play.connects,
        "sessions": {name: [_told(play, s) for s in sessions] for name, sessions in play.sessions.items() if sessions},
        "outcome": outcome,
        "log": _log(play, lines.found, outcome.get("attempts", ())),
    }


def _told(play: Play, session: Session) -> list[str]:
    """What the client said in one session, a line for each message."""
    told: list[Message] = []
    for message in session.heard:
        if message["type"] in {"Verdict", "Goodbye"} and session.name in play.scenario.loose:
            continue
        if not play.scenario.shares and message["type"] in {told[-1]["type"] if told else "", "Verdict"}:
            continue  # how much more is asked for is a matter of time
        if told and message["type"] == told[-1]["type"] == "Want":
            ranges = by_hand.expand([*told[-1]["ranges"], *message["ranges"]])
            told[-1] = {"type": "Want", "ranges": by_hand.to_ranges(ranges)}
        else:
            told.append(message)
        if message.get("outcome") == "complete":
            break  # how they part is of no consequence any more
    return [" ".join([m["type"], *(f"{k}={_short(v)}" for k, v in m.items() if k != "type")]) for m in told]


def _log(play: Play, lines: Sequence[str], attempts: Sequence[str]) -> list[str]:
    """What was logged, besides one warning for each attempt that failed. Hints are left out, and so is the summary:
    it tells the outcome again, with seconds in it.
    """
    found = [play.plain(line) for line in lines if not line.startswith("INFO: netloader: pulled ")]
    for attempt in attempts:
        told = next(line for line in found if line.startswith("WARNING: source " + attempt.partition(": ")[2]))
        found.remove(told)
    return sorted(re.sub(r" \(.*\)$", "", line) if line.startswith("WARNING") else line for line in found)


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


async def _outcome(play: Play) -> dict[str, Any]:
    arguments = dict(play.scenario.pull)
    names = list(play.scenario.sources) if play.scenario.given is None else play.scenario.given
    sources = [play.address(name) for name in names]
    if "expect" in arguments:
        arguments["expect_root"] = play.weights(arguments.pop("expect")).root
    relay = netloader.Server(host=HOST, transport="tcp") if arguments.pop("relay", False) else None
    usual: dict[str, Any] = {
        "transport": "tcp",
        "timeout": by_hand.PATIENCE,
        "stall_timeout": by_hand.PATIENCE,
        "progress": lambda step: play.mark(f"verified {step.verified}").set(),
    }
    with anyio.fail_after(by_hand.PATIENCE):
        try:
            if arguments.pop("probe", False):
                found = await netloader.probe(sources[0], netloader.ModelIdentity(model=MODEL), **arguments)
                held = found.announcement
                return {"probe": held.identity.model, "root": held.root == play.weights(0).root}
            if arguments.pop("adopt", False):
                tensors, report = await netloader.pull_new(sources=sources, **{**usual, **arguments})
                return _account(play, tensors, report)
            into = play.weights(0).blank()
            identity = netloader.ModelIdentity(model=MODEL)
            kwargs = {"stripe": 1, **usual, **arguments}
            if relay is None:
                report = await netloader.pull(into, identity, sources=sources, **kwargs)
            else:
                async with relay:
                    report = await netloader.pull(into, identity, sources=sources, relay=relay, **kwargs)
                    assert [s.role for s in relay.sessions] == []
            return _account(play, into, report)
        except netloader.NetloaderError as error:
            if not isinstance(error, netloader.NoSourceLeft):
                return {"error": f"{type(error).__name__}: {play.plain(str(error))}"}
            if not all(attempt.message in str(error) for attempt in error.attempts):
                raise AssertionError("the error does not say what was tried") from error
            return {
                "error": "NoSourceLeft",
                "attempts": _attempts(play, error.attempts),
                "verified": error.verified,
                "total": error.total,
            }


def _account(play: Play, tensors: Mapping[str, torch.Tensor], report: netloader.PullReport) -> dict[str, Any]:
    seed = play.seed_of(report.root)
    assert seed is not None
    held = {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    assert held == play.weights(seed).contents
    told = {
        "root": f"root {seed}",
        "blocks": report.blocks,
        "bytes": report.nbytes,
        "tensors": report.tensors,
        "retries": report.retries,
        "attempts": _attempts(play, report.attempts),
        "identity": report.identity.model,
    }
    if play.scenario.shares:
        told["sources"] = {
            play.plain(source): f"{share.blocks} by {share.transport or 'nothing'}"
            for source, share in report.sources.items()
        }
    return told


def _attempts(play: Play, attempts: Sequence[netloader.AttemptFailed]) -> list[str]:
    return [f"{type(attempt.cause).__name__}: {play.plain(attempt.message)}" for attempt in attempts]


class _Lines(logging.Handler):
    """What the package logs for an operator meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{record.levelname}: {record.getMessage()}")

    def __enter__(self) -> None:
        log = logging.getLogger("netloader")
        self._level = log.level
        log.addHandler(self)
        log.setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        log = logging.getLogger("netloader")
        log.removeHandler(self)
        log.setLevel(self._level)
