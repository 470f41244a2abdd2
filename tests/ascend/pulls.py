"""Instances of one rank or several, a card and a process each: one that serves, and one that pulls from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.ascend.processes import Engine, EngineFailed

Digests = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Of one rank: of its raw and of its final tensors, by the role of the model, by name."""

NAME, DRAFT = "tiny", "tiny-draft"


@dataclass(frozen=True)
class Instance:
    """The processes of an instance, by rank."""

    engines: Sequence[Engine]

    @classmethod
    @contextmanager
    def on(cls, cards: Sequence[int], folder: Path, **more: str) -> Iterator[Self]:
        """Processes on these cards, with more environment variables; ended with the context."""
        folder.mkdir()
        with ExitStack() as stack:
            yield cls([stack.enter_context(Engine(card, folder, rank, more=more)) for rank, card in enumerate(cards)])

    def begin(self, what: str, **task: Any) -> None:
        """Send each rank a request; `answers` waits for it."""
        for engine in self.engines:
            engine.request(what, **task)

    def answers(self) -> list[dict[str, Any]]:
        """The answer of each rank to the request that was begun: they wait for each other meanwhile."""
        answers, failed = [], []
        for engine in self.engines:
            try:
                answers.append(engine.answer())
            except EngineFailed as error:  # the others have to come to their end too
                failed.append(error)
        if failed:
            raise failed[0]
        return answers

    def all(self, what: str, **task: Any) -> list[dict[str, Any]]:
        """Send each rank a request; their answers."""
        self.begin(what, **task)
        return self.answers()

    def load(
        self, model: Path, arguments: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> Sequence[Digests]:
        """Load `model`, with netloader if there are settings for it; the digests of each rank."""
        self.begin_load(model, arguments, extra)
        return self.answers()

    def begin_load(self, model: Path, arguments: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> None:
        """Begin to do the same; `answers` are the digests."""
        load_format = "auto" if extra is None else "netloader"
        more = {"tensor_parallel_size": len(self.engines), "distributed_executor_backend": "mp"}
        parallel = more if len(self.engines) > 1 else {}
        self.begin(
            "load",
            model=str(model),
            load_format=load_format,
            extra=dict(extra or {}),
            arguments={**arguments, **parallel},
        )

    def profiled(self) -> None:
        """Measure the memory: until then a server opens nothing on its card."""
        self.all("profile")

    def addresses(self) -> list[str]:
        """The address of each rank's server."""
        return [answer["address"] for answer in self.all("serving")]

    def lines(self, *parts: str) -> list[list[str]]:
        """The lines that each rank logged with all of `parts` in them."""
        return [[line for line in engine.log if all(part in line for part in parts)] for engine in self.engines]


def settings(sources: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """The loader's settings, with a source for each rank."""
    found = [{"device_id": rank, "sources": [source]} for rank, source in enumerate(sources)]
    return {"MODEL": NAME, "DRAFT_MODEL": DRAFT, **({"SOURCE": found} if found else {}), **more}


def differences(one: Sequence[Digests], other: Sequence[Digests]) -> list[str]:
    """The names of all tensors that differ or that only one has, by rank, stage and role."""
    found = []
    for rank, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        for stage in sorted(ours.keys() | theirs.keys()):
            for role in sorted(ours[stage].keys() | theirs[stage].keys()):
                left, right = ours[stage].get(role, {}), theirs[stage].get(role, {})
                names = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
                found += [f"rank {rank}: {stage} {role} {name}" for name in names]
    return found
