"""A load as a sequence of steps: their order, the value that each step returns, and what clients are told."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from netloader.config import Config, load_config
from netloader.core.identity import ModelIdentity
from netloader.errors import MemoryStillInUse, PeerLost
from netloader.tensors import hold
from netloader.vllm.load import (
    agree_ranks,
    examine_model,
    fill_model,
    inspect_engine,
    loading,
    pull_together,
    pull_weights,
)
from netloader.vllm.load.agree_ranks import Decision, agree, agree_on_roots
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.file_reads import FileReads
from netloader.vllm.load.fill_model import Filled, fill
from netloader.vllm.load.inspect_engine import Context, Engine, NothingPulled, Probed
from netloader.vllm.load.loading import Loaded, load_weights, serve_loaded
from netloader.vllm.load.processed_pull import Adopted, NotAdopted
from netloader.vllm.load.pull_weights import Pulled, pull
from netloader.vllm.model.agreement import Report, load_digest
from netloader.vllm.model.copies import Keep
from netloader.vllm.model.initial_values import InitialValues
from netloader.vllm.model.settings import Settings
from netloader.vllm.model.snapshot import RawWeights, named_raw_tensors
from netloader.vllm.model.topology import Topology
from netloader.vllm.serve import choose_layout as choosing
from netloader.vllm.serve.choose_layout import Choice, choose_layout
from netloader.vllm.serve.guard import refuse_on_failure
from netloader.vllm.serve.offer import serve
from netloader.vllm.serve.recording import Record, Recorded, Snapshot

IDENTITY = ModelIdentity(model="m")
TOPOLOGY = Topology(0, 1, 0, 1, 0, 1, 0, "")
ROOT = "ab" * 16
MODEL = torch.nn.Linear(4, 4)
ADOPTED: Any = SimpleNamespace()
IN_USE = MemoryStillInUse("a thread", writes=True, seconds=1.0)


class Server:
    """Records the calls to a worker's server."""

    running = True

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def offer(self, holding: Any, detail: str) -> None:
        self.asked.append(("offer", holding, detail))

    def refuse(self, role: str, reason: str, hint: str, layouts: tuple[str, ...] = ("raw", "processed")) -> None:
        self.asked.append(("refuse", role, reason, hint, layouts))

    def withdraw(self, role: str, reason: str, *, grace: float, sources: tuple[str, ...]) -> None:
        self.asked.append(("withdraw", role, grace, sources))

    def serves(self, role: str) -> Any:
        self.asked.append(("serves", role))
        return "what the target offers"


def context_of(server: Any = None, loader: Any = None, **settings: Any) -> Context:
    engine = Engine(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(device="cpu"))
    return Context(engine, Config(**settings), TOPOLOGY, (), loader, FileReads(), server=server)


def adopted_report(**shares: int) -> Any:
    sources = {name: SimpleNamespace(blocks=blocks) for name, blocks in shares.items()}
    return SimpleNamespace(sources=sources)


VALUES = (Engine, Probed, Context, Built, Pulled, Decision, Filled, Record, Recorded, Snapshot, Loaded, Choice, Adopted)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_what_a_step_returns_is_frozen(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    made = object.__new__(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, None)


# --- the order of the steps -----------------------------------------------------------------------------------------


def decided(outcome: Any = "pulled", why_not: str = "", *, root: str = "", other: Any = None) -> Decision:
    told = Report(outcome, 0, root=root, serves=True)
    return Decision(told, (told,) if other is None else (told, Report(other, 1, root=root)), why_not)


@dataclasses.dataclass
class Steps:
    """Simulated steps, which record that they were called."""

    taken: list[str] = dataclasses.field(default_factory=list)
    returns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def take(self, name: str) -> Callable[..., Any]:
        def step(*_: Any) -> Any:
            self.taken.append(name)
            found = self.returns[name]
            value = found.pop(0) if len(found) > 1 else found[0]
            if isinstance(value, BaseException):
                raise value
            return value

        return step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps()
    built, pulled = Built({}, {}, None), Pulled(Report("pulled", 0), adopted_report(a=3, b=0))
    recorded = Snapshot("target", Record(), identity=IDENTITY)
    found.returns = {
        "examine": [built],
        "pull": [pulled],
        "agree": [decided()],
        "fill": [Filled(IDENTITY, "")],
        "record": [recorded],
        "agree_on_roots": [decided(root=ROOT)],
        "skip_transformations": [None],
    }
    for name in found.returns:
        home = pull_together if name in ("pull", "agree") else loading
        monkeypatch.setattr(home, name, found.take(name))
    return found


def test_the_steps_of_a_load(steps: Steps) -> None:
    server = Server()
    loaded = load_weights(context_of(server, relay_grace=7.0), MODEL)
    assert steps.taken == ["examine", "pull", "agree", "fill", "record", "agree_on_roots"]
    assert loaded.snapshot.load == load_digest([ROOT])
    assert server.asked == [("withdraw", "target", 7.0, ("a",))], "nothing is passed on after the load"


def test_a_mixture_is_loaded_by_default_recorded_and_compared_again(steps: Steps) -> None:
    steps.returns["agree_on_roots"] = [decided(why_not="a mixture"), decided("default", root=ROOT)]
    loaded = load_weights(context_of(), MODEL)
    again = ["fill", "record", "agree_on_roots"]
    assert steps.taken == ["examine", "pull", "agree", *again, *again]
    assert loaded.snapshot.load == load_digest([ROOT])


def test_a_rank_that_loaded_by_default_only_compares_again_after_a_mixture(steps: Steps) -> None:
    steps.returns["agree_on_roots"] = [decided("default", "a mixture"), decided("default", root=ROOT)]
    load_weights(context_of(), MODEL)
    assert steps.taken[-3:] == ["record", "agree_on_roots", "agree_on_roots"]
    assert steps.taken.count("fill") == 1


@pytest.mark.parametrize("step", ["agree", "fill", "agree_on_roots"])
def test_a_load_that_fails_stops_passing_on_at_once(step: str, steps: Steps) -> None:
    server, error = Server(), IN_USE
    steps.returns[step] = [error]
    with pytest.raises(MemoryStillInUse):
        load_weights(context_of(server, relay_grace=7.0), MODEL)
    assert steps.taken[-1] == step
    assert server.asked == [("withdraw", "target", 0.0, ("a",))]


def test_post_processing_does_not_transform_pulled_processed_weights(steps: Steps) -> None:
    steps.returns["fill"] = [Filled(IDENTITY, "", adopted=ADOPTED)]
    assert load_weights(context_of(), MODEL).adopted is ADOPTED
    assert steps.taken[-1] == "skip_transformations"


# --- the ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """The reports of this rank. The other rank reports that it pulled, and that it serves."""
    found: list[Report] = []

    def exchange(mine: Report, *_: Any) -> tuple[Report, ...]:
        found.append(mine)
        return mine, Report("pulled", 1, root=ROOT, load="cd" * 16, fingerprint=ROOT, serves=True)

    monkeypatch.setattr(agree_ranks, "exchange", exchange)
    monkeypatch.setattr(agree_ranks, "groups_of_this_engine", lambda **_: [])
    return found


def test_the_other_ranks_are_told_of_memory_in_use_before_the_load_ends(told: list[Report]) -> None:
    mine = Report("failed", 0, reason="a thread writes")
    with pytest.raises(MemoryStillInUse):
        agree(context_of(), Pulled(mine, memory_in_use=IN_USE))
    assert told == [mine]


def test_one_rank_that_failed_means_that_no_rank_keeps_what_it_pulled(told: list[Report]) -> None:
    decision = agree(context_of(), Pulled(Report("failed", 0, reason="no route")))
    assert (decision.why_not, decision.keeps) == ("rank 0 could not pull: no route", False)
    assert decision.why_default == "could not pull: no route"
    assert decision.wants_roots
    # The weights of a rank were loaded by default now, whatever it reported before.
    agree_on_roots(context_of(), decision, ROOT, "ef")
    assert (told[-1].outcome, told[-1].root, told[-1].fingerprint, told[-1].reason) == ("default", ROOT, "ef", "")


def test_kept_weights_are_reported_as_pulled_in_both_exchanges(told: list[Report]) -> None:
    mine = Report("pulled", 0, root=ROOT, load=load_digest([ROOT, ROOT]))
    decision = Decision(mine, (mine, msgspec.structs.replace(mine, rank=1, serves=True)), "")
    assert decision.keeps
    agree_on_roots(context_of(), decision, ROOT, "")
    assert told == [mine]


def test_roots_that_no_rank_needs_are_not_exchanged(told: list[Report]) -> None:
    alone = Decision(Report("default", 0), (Report("default", 0),), "")
    decision = agree_on_roots(context_of(), alone, "", "")
    assert told == []
    assert (decision.why_not, decision.load) == ("", "")


# --- the model without weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fingerprint_of_model", "named_raw_tensors", "expert_maps"])
def test_a_model_that_cannot_be_examined_is_not_supported_and_ends_nothing(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("fingerprint_of_model", ROOT), ("why_not", "")):
        monkeypatch.setattr(examine_model, name, lambda *_, value=value: value)
    context = dataclasses.replace(context_of(), probed=Probed(IDENTITY))
    sound = examine_model.examine(context, MODEL)
    assert (sound.unsupported, sound.fingerprint, sorted(sound.tensors)) == ("", ROOT, ["bias", "weight"])
    assert sound.identity == msgspec.structs.replace(IDENTITY, fingerprint=ROOT)

    def fails(*_: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(examine_model, step, fails)
    built = examine_model.examine(context, MODEL)
    assert built.unsupported == "looking at the model failed: MemoryError: none left"
    assert built.identity is None
    assert "rank 0: looking at the model failed: nothing is pulled or served" in caplog.text


def test_a_model_whose_identity_is_not_known_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_model, "fingerprint_of_model", lambda _: ROOT)
    monkeypatch.setattr(examine_model, "why_not", lambda *_: "")
    built = examine_model.examine(context_of(), MODEL)
    assert built.unsupported == "looking at the model failed: its identity could not be determined"
    assert built.identity is None


def test_the_result_of_the_probe_is_not_determined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_model, "fingerprint_of_model", lambda _: ROOT)
    monkeypatch.setattr(examine_model, "why_not", lambda *_: "")
    untied = msgspec.structs.replace(IDENTITY, tied=False)
    built = examine_model.examine(dataclasses.replace(context_of(), probed=Probed(untied)), MODEL)
    assert built.identity == msgspec.structs.replace(untied, fingerprint=ROOT)


# --- pulling and filling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fallback", "outcome"), [(True, "default"), (False, "failed")])
def test_what_is_not_supported_is_not_pulled(fallback: bool, outcome: str) -> None:
    config = load_config({"SOURCE": [{"device_id": 0, "sources": ["127.0.0.1:9"]}], "FALLBACK": fallback})
    built = Built({}, {}, None, unsupported="it moves", fingerprint=ROOT)
    context = dataclasses.replace(context_of(), config=config)
    pulled = pull(context, built, MODEL)
    assert pulled == Pulled(Report(outcome, 0, fingerprint=ROOT, reason="it moves"))  # type: ignore[arg-type]
    assert pulled.parents == ()


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The results of pulling raw weights, of finding sources with processed ones, and of pulling those."""
    found: dict[str, list[Any]] = {"pull_raw": [], "only_processed": [], "adopt_processed": []}

    def answer(name: str) -> Callable[..., Any]:
        def ask(*_: Any) -> Any:
            value = found[name].pop(0)
            if isinstance(value, Exception):
                raise value
            return value

        return ask

    for name in found:
        monkeypatch.setattr(pull_weights, name, answer(name))
    monkeypatch.setattr(pull_weights, "check_supported", lambda _: None)
    return found


def pulled_of(model: torch.nn.Module) -> Pulled:
    config = load_config({"SOURCE": [{"device_id": 0, "sources": ["127.0.0.1:1024"]}]})
    registrations: Any = SimpleNamespace()
    context = dataclasses.replace(context_of(Server()), config=config, registrations=registrations)
    return pull(context, Built(named_raw_tensors(model), {}, None, identity=IDENTITY, fingerprint=ROOT), model)


LOST = PeerLost("the source died")


@pytest.mark.parametrize(
    ("raw", "processed", "adopting", "told", "rebuild", "in_use"),
    [
        (LOST, [], None, ("failed", str(LOST)), False, False),
        (IN_USE, None, None, ("failed", str(IN_USE)), False, True),
        (KeyError("x"), None, None, ("failed", "unexpected KeyError: 'x'"), False, False),
        (LOST, ValueError("y"), None, ("failed", "unexpected ValueError: y"), False, False),
        (LOST, ["a"], NotAdopted("other"), ("failed", "processed weights: other"), True, False),
        (LOST, ["a"], IN_USE, ("failed", f"processed weights: {IN_USE}"), True, True),
        (LOST, ["a"], KeyError("z"), ("failed", "unexpected KeyError: 'z'"), True, False),
        (LOST, ["a"], SimpleNamespace(report=SimpleNamespace(identity=IDENTITY)), ("pulled", ""), True, False),
    ],
)
def test_how_a_pull_ended_is_a_value(
    raw: Exception,
    processed: Any,
    adopting: Any,
    told: tuple[str, str],
    rebuild: bool,
    in_use: bool,
    sources: dict[str, list[Any]],
) -> None:
    given = {"pull_raw": raw, "only_processed": processed, "adopt_processed": adopting}
    for name, value in given.items():
        sources[name] = [] if value is None else [value]
    pulled = pulled_of(torch.nn.Linear(4, 4))
    assert (pulled.own_report.outcome, pulled.own_report.reason) == told
    assert (pulled.rebuild, pulled.memory_in_use is IN_USE) == (rebuild, in_use)
    assert pulled.own_report.root == "", "those of raw weights are compared"
    assert (pulled.adopted is not None) == (told[0] == "pulled")
    assert pulled.own_report.serves
    assert pulled.initial is not None
    assert not any(sources.values()), "nothing else is tried"


class Loader:
    """A default loader."""

    def __init__(self, model: torch.nn.Linear) -> None:
        self.model = model

    def load_weights(self, model: torch.nn.Module, _: Any) -> None:
        assert model is self.model
        with torch.no_grad():
            self.model.weight.fill_(2)


def test_the_default_loader_fills_what_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fill_model, "fingerprint_of_model", lambda _: ROOT)
    caplog.set_level(logging.INFO)
    model, server = torch.nn.Linear(4, 4), Server()
    built = Built(named_raw_tensors(model), {}, None, identity=IDENTITY)
    pulled = Pulled(Report("pulled", 0), adopted_report(a=1))
    filled = fill(context_of(server, Loader(model)), built, pulled, decided(why_not="of rank 1"), model)
    assert (filled.identity, filled.fingerprint) == (msgspec.structs.replace(IDENTITY, fingerprint=ROOT), ROOT)
    assert filled.reason == "what was pulled is not kept: of rank 1"
    assert filled.seconds > 0
    assert bool((model.weight == 2).all())
    assert server.asked == [("withdraw", "target", 0.0, ("a",))]
    assert "the default loader (auto) loads the target: what was pulled is not kept: of rank 1" in caplog.text


def test_without_a_default_loader_nothing_is_filled() -> None:
    built, pulled = Built({}, {}, None, identity=IDENTITY), Pulled(Report("failed", 0, reason="no route"))
    decision = Decision(Report("failed", 0, reason="no route"), (), "no route")
    with pytest.raises(NothingPulled, match="FALLBACK is false: could not pull: no route"):
        fill(context_of(), built, pulled, decision, MODEL)


# --- what is served -------------------------------------------------------------------------------------------------


def recorded_of(model: torch.nn.Module, keep: Keep = Keep.REFERENCE) -> Record:
    announcement = hold(named_raw_tensors(model), IDENTITY).announcement
    raw = RawWeights(model, announcement, lambda _: keep)
    return Record(announcement, Recorded(raw, announcement, raw.device, frozenset()))


class Big(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Linear(64, 64)


def rewritten(model: Big) -> Big:
    with torch.no_grad():
        model.part.weight.add_(1)
    return model


def test_raw_weights_that_are_still_there_are_offered() -> None:
    model, server = Big(), Server()
    snapshot = Snapshot("target", recorded_of(model), load=ROOT, identity=IDENTITY)
    choice = choose_layout(snapshot, model, Config())
    assert choice.holding is not None
    assert choice.holding.announcement.identity.load == ROOT
    serve(server, 0, choice)  # type: ignore[arg-type]
    ((what, holding, detail),) = server.asked
    assert (what, holding) == ("offer", choice.holding)
    assert detail.startswith("raw layout, 2 tensors, ")


def test_processed_weights_are_offered_where_raw_ones_are_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, server, sizes = Big(), Server(), list[Any]()

    def holds(model: torch.nn.Module, identity: ModelIdentity, raw_bytes: Any) -> tuple[Any, str]:
        sizes.append(dict(raw_bytes))
        return hold(named_raw_tensors(model), msgspec.structs.replace(identity, layout="processed")), ""

    monkeypatch.setattr(choosing, "hold_processed", holds)
    snapshot = Snapshot("target", recorded_of(model), identity=IDENTITY)
    serve(server, 0, choose_layout(snapshot, rewritten(model), Config()))  # type: ignore[arg-type]
    assert sizes == [{"part.weight": 64 * 64 * 4, "part.bias": 64 * 4}]
    (offer, refused) = server.asked
    assert offer[2].startswith("processed layout, 2 tensors, ")
    reason = "post-processing left 1 raw tensors behind: part.weight (vLLM rewrote it in place)"
    assert refused[2] == f"{reason}; the processed layout is held"
    assert refused[4] == ("raw",)
    assert f"rank 0: target: no raw layout: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("shares", "identity", "why"),
    [
        (True, IDENTITY, "a draft that shares tensors with its target is served raw only"),
        (False, IDENTITY, "it has a handle"),
        (False, None, "it is not known what this model is"),
    ],
)
def test_nothing_is_offered_where_no_layout_is_exact(
    shares: bool, identity: ModelIdentity | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "hold_processed", lambda *_: (None, "it has a handle"))
    model, server = Big(), Server()
    snapshot = Snapshot("draft", recorded_of(model), identity=identity, shares=shares)
    serve(server, 0, choose_layout(snapshot, rewritten(model), Config()))  # type: ignore[arg-type]
    ((what, role, reason, hint, layouts),) = server.asked
    assert (what, role, layouts) == ("refuse", "draft", ("raw", "processed"))
    assert reason.endswith(f"; its processed weights are not exact either: {why}")
    assert hint


def test_a_model_without_raw_weights_is_refused_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    snapshot = Snapshot("target", Record(refusal=("it moves", "stop it")))
    serve(server, 3, choose_layout(snapshot, Big(), Config()))  # type: ignore[arg-type]
    assert server.asked == [("refuse", "target", "it moves", "stop it", ("raw", "processed"))]
    assert "rank 3 does not serve its target: it moves (stop it)" in caplog.text


@pytest.mark.parametrize("step", ["choose_layout", "serve"])
def test_an_error_of_serving_is_told_to_clients_and_ends_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(loading, step, fails)
    server = Server()
    serve_loaded(Loaded(context_of(server), Snapshot("target", Record())), Big())
    ((what, role, reason, *_),) = server.asked
    assert (what, role, reason) == ("refuse", "target", "offering the weights failed: MemoryError: none left")


def test_processed_weights_that_changed_end_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: Any) -> None:
        raise inspect_engine.NothingPulled("not what was pulled")

    monkeypatch.setattr(loading, "check_adopted", differs)
    server = Server()
    loaded = Loaded(context_of(server), Snapshot("target", Record(), processed=True), ADOPTED)
    with pytest.raises(NothingPulled):
        serve_loaded(loaded, Big())
    assert server.asked == []


def test_waiting_clients_are_told_of_a_failed_load() -> None:
    server: Any = Server()
    with pytest.raises(KeyboardInterrupt), refuse_on_failure(server, "target"):
        raise KeyboardInterrupt
    ((what, role, reason, *_),) = server.asked
    assert (what, role) == ("refuse", "target")
    assert reason.startswith("the model could not be loaded: ")


# --- errors that must not end a load ----------------------------------------------------------------------------------


def test_a_file_with_a_tensor_that_cannot_be_hashed_is_read_and_the_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sparse.pt"
    torch.save({"table": torch.eye(3).to_sparse()}, path)
    with FileReads() as reads:
        found = torch.load(path, weights_only=True)
    assert torch.equal(found["table"].to_dense(), torch.eye(3))
    assert reads.traced({}).lost == (str(path),)
    assert f"what the model reads from {path} cannot be compared" in caplog.text


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("model_identity", "rank 0: looking at the model failed"),
        ("could_adopt", "rank 0: unexpected error while the sources were probed"),
    ],
)
@pytest.mark.parametrize("origin", ["any", "lease"])
def test_a_probe_that_fails_unexpectedly_does_not_end_the_load(
    step: str, line: str, origin: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("no such field")

    asked: list[Any] = []

    def ask(_registry: Any, _server: Any, identity: Any, *_: Any, **__: Any) -> str:
        asked.append(identity)
        return ""

    for name, value in {
        "loads_from_storage": ask,
        "find_sources": lambda *_, **__: [],
        "shares_with_target": lambda *_: False,
        "topology_of": lambda *_: Topology(0, 1, 0, 1, 0, 1, 0, ""),
        "fallback_loader": lambda *_: "the default loader",
        "_open_server": lambda *_: None,
        "model_identity": lambda *_: IDENTITY,
        step: fails,
    }.items():
        monkeypatch.setattr(inspect_engine, name, value)
    monkeypatch.setattr(inspect_engine, "_settings", lambda _: Settings())
    fields = {"SOURCE": [{"device_id": 0, "sources": ["127.0.0.1:1024"]}], "DISCOVERY": "etcd://h", "ORIGIN": origin}
    context = inspect_engine.inspect(context_of().engine, load_config(fields))
    known = None if step == "model_identity" else IDENTITY
    assert (context.probed, context.default_loader) == (known and Probed(known), "the default loader")
    assert line in caplog.text
    assert asked == ([known] if origin == "lease" else []), "the other ranks wait for the answer"


@pytest.mark.parametrize(
    ("identity", "settings", "asks_for"),
    [
        (IDENTITY, Settings(), IDENTITY),
        (IDENTITY, Settings(unknown="an unknown argument"), None),
        (msgspec.structs.replace(IDENTITY, quantization="odd"), Settings(), None),
        (msgspec.structs.replace(IDENTITY, settings={"x": "\udc80"}), Settings(), None),
        (None, Settings(), None),
    ],
)
def test_an_engine_that_could_not_serve_asks_for_no_lease(
    identity: Any, settings: Settings, asks_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(_registry: Any, _server: Any, identity: Any, *_: Any, **__: Any) -> str:
        asked.append(identity)
        return "because"

    monkeypatch.setattr(inspect_engine, "loads_from_storage", ask)
    config = load_config({"DISCOVERY": "etcd://h", "ORIGIN": "lease"})
    why = inspect_engine._why_storage(context_of().engine, config, TOPOLOGY, settings, object(), None, identity)  # type: ignore[arg-type]
    assert (why, asked) == ("because", [asks_for])


def test_weights_that_are_passed_on_are_withdrawn_before_their_memory_is_restored(
    sources: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pull of raw weights succeeded, and the digests that the source announced are refused."""
    sources["pull_raw"] = [SimpleNamespace(identity=msgspec.structs.replace(IDENTITY, load="no digest"))]
    sources["only_processed"], sources["adopt_processed"] = [["a"]], [NotAdopted("other")]
    asked: list[str] = []
    monkeypatch.setattr(Server, "withdraw", lambda *_, **__: asked.append("withdraw"))
    monkeypatch.setattr(InitialValues, "restore", lambda _: asked.append("restore"))
    assert pulled_of(torch.nn.Linear(4, 4)).own_report.outcome == "failed"
    assert asked == ["withdraw", "restore"]


@pytest.mark.parametrize("origin", ["any", "lease"])
def test_an_engine_that_finds_no_source_any_more_asks_again_who_loads(
    origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin was listed a moment ago. The pull searches too, and fails, and then all ranks ask again."""
    waits: list[float] = []

    def find(*_: Any, wait: float, **__: Any) -> list[Any]:
        waits.append(wait)
        return []

    for name, value in {
        "topology_of": lambda *_: TOPOLOGY,
        "fallback_loader": lambda *_: "the default loader",
        "_open_server": lambda *_: None,
        "loads_from_storage": lambda *_, **__: "",
        "find_sources": find,
        "model_identity": lambda *_: IDENTITY,
        "could_adopt": lambda _: False,
        "shares_with_target": lambda *_: False,
    }.items():
        monkeypatch.setattr(inspect_engine, name, value)
    config = load_config({"DISCOVERY": "etcd://h", "ORIGIN": origin, "WAIT": 600})
    context = inspect_engine.inspect(context_of().engine, config)
    if origin == "lease":
        assert (context.leased, context.why_no_source, waits) == (True, "", [5.0])
    else:
        assert not context.leased
        assert "no server of this model was found" in context.why_no_source
        assert waits[0] > 5.0
