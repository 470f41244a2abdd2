"""Draft models that share tensors with their target: pulled, and equal to a disk load before and after the sharing."""

from __future__ import annotations

import pytest

from netloader import sync
from netloader.session.holding import Holding
from netloader.vllm.load import agree_ranks, inspect_engine
from netloader.vllm.model.load_state import load_state_of
from netloader.vllm.serve import serving
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.drafts import KINDS, Pair, load_pair
from tests.vllm.pulls import NAME, LogLines, extra, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

EQUAL = KINDS["EAGLE with the target's embeddings"]


def seed_of(case: str, models: ModelStore) -> tuple[Pair, str]:
    """A seed with target and draft, and its address."""
    kind = KINDS[case]
    seed = load_pair(models.get(kind.target), kind.speculative(models.get), extra())
    return seed, address()


def address() -> str:
    """The address of this process's server."""
    server = serving.running_server()
    assert server is not None
    return server.address


def held(role: str) -> list[Holding]:
    """The holdings of this process under a role."""
    server = serving.running_server()
    assert server is not None
    return [holding for holding in server._server.holdings.held() if holding.announcement.identity.role == role]


def from_source(source: str, **settings: object) -> dict[str, object]:
    """Settings of a client without a server."""
    return extra([source], SERVE=False, **settings)


@pytest.mark.parametrize("case", KINDS)
def test_a_draft_is_pulled_as_a_disk_load_makes_it(case: str, models: ModelStore, log_lines: LogLines) -> None:
    kind = KINDS[case]
    disk = load_pair(models.get(kind.target), kind.speculative(models.get))
    seed, source = seed_of(case, models)
    assert log_lines.one("serves draft at", source)
    assert seed.filled(kind) == disk.filled(kind)
    said = sync.probe(source, role="draft").announcement
    assert kind.unfilled <= set(disk.draft.raw)
    assert {spec.name for spec in said.manifest.tensors} == set(disk.draft.raw) - kind.unfilled
    assert said.identity.load_state == kind.state
    disk.share()

    # Twice: before the seed's proposer shares, and after.
    for _ in range(2):
        log_lines.lines.clear()
        settings = from_source(source, FALLBACK=False)
        client = load_pair(models.bare(kind.target), kind.speculative(models.get), settings)
        assert log_lines.one("rank 0: draft: pulled ")
        assert client.target.raw == disk.target.raw
        assert client.filled(kind) == disk.filled(kind)
        for name, value in kind.state.items():
            assert getattr(client.draft.model, name) is value
        client.share()
        assert harness.raw_digests(client.draft.model) == harness.raw_digests(disk.draft.model)
        seed.share()


def test_a_client_serves_the_draft_that_it_pulled(models: ModelStore, log_lines: LogLines) -> None:
    """At the second client too, the attributes and the left-out tensors are right, and the root is the same."""
    kind = KINDS["EAGLE"]
    seed, _ = seed_of("EAGLE", models)
    (holding,) = held("draft")
    serving.stop_server()
    with source_of(holding) as source:
        first = load_pair(models.get(kind.target), kind.speculative(models.get), extra(), draft=extra([source]))
        first.share()
    assert first.filled(kind) == seed.filled(kind)
    assert sync.probe(address(), role="draft").announcement.root == holding.announcement.root
    settings = from_source(address(), FALLBACK=False)
    second = load_pair(models.bare(kind.target), kind.speculative(models.get), settings)
    assert second.filled(kind) == seed.filled(kind)


def test_dropped_tensors_are_gone_without_a_substitute(models: ModelStore, log_lines: LogLines) -> None:
    """The target is not served. vLLM replaces the draft's embeddings by the target's, and nothing keeps the draft's."""
    speculative = EQUAL.speculative(models.get)
    disk = load_pair(models.get(EQUAL.target), speculative)
    seed = load_pair(models.get(EQUAL.target), speculative, extra(SERVE=False), draft=extra())
    source = address()
    assert load_pair(models.get(EQUAL.target), speculative, None, draft=from_source(source)).draft.raw == disk.draft.raw
    assert log_lines.one("rank 0: draft: pulled ")
    seed.share()
    log_lines.lines.clear()
    assert load_pair(models.get(EQUAL.target), speculative, None, draft=from_source(source)).draft.raw == disk.draft.raw
    assert "model.embed_tokens.weight was dropped by its owner" in log_lines.one(
        "the default loader", "loads the draft"
    )


def test_a_substitute_that_was_changed_is_refused(models: ModelStore, log_lines: LogLines) -> None:
    """The client compares a substitute with the announced digest, as every other tensor."""
    speculative = EQUAL.speculative(models.get)
    seed, source = seed_of("EAGLE with the target's embeddings", models)
    seed.share()
    dict(seed.target.model.named_parameters())["model.embed_tokens.weight"].data[0, 0] += 1
    log_lines.lines.clear()
    client = load_pair(models.get(EQUAL.target), speculative, None, draft=from_source(source))
    assert client.draft.raw == seed.draft.raw
    assert "arrived with digest" in log_lines.one("the default loader", "loads the draft")


def test_a_draft_that_falls_back_leaves_its_target_pulled(models: ModelStore, log_lines: LogLines) -> None:
    kind = KINDS["EAGLE with other embeddings"]
    _, source = seed_of("EAGLE", models)
    disk = load_pair(models.get(kind.target), kind.speculative(models.get))
    log_lines.lines.clear()
    client = load_pair(models.bare(kind.target), kind.speculative(models.get), from_source(source))
    assert log_lines.one("rank 0: target: pulled ")
    assert "the identities differ: model is" in log_lines.one("the default loader", "loads the draft")
    assert (client.target.raw, client.draft.raw) == (disk.target.raw, disk.draft.raw)
    assert load_state_of(client.draft.model) == kind.state


def test_a_target_that_falls_back_leaves_its_draft_pulled(models: ModelStore, log_lines: LogLines) -> None:
    kind = KINDS["EAGLE"]
    seed, source = seed_of("EAGLE", models)
    log_lines.lines.clear()
    settings = from_source(source, MODEL="another")
    client = load_pair(models.get(kind.target), kind.speculative(models.get), settings)
    assert "the identities differ: model is" in log_lines.one("the default loader", "loads the target")
    assert log_lines.one("rank 0: draft: pulled ")
    assert client.target.raw == seed.target.raw
    assert client.filled(kind) == seed.filled(kind)


def test_facts_of_a_pull_that_is_not_kept_are_forgotten(
    models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's draft has embeddings of its own. The draft that the default loader reads afterwards has none."""
    kind = KINDS["EAGLE"]
    seed, _ = seed_of("EAGLE with other embeddings", models)
    (holding,) = held("draft")
    monkeypatch.setattr(agree_ranks, "roots_wanted", lambda _: True)
    monkeypatch.setattr(agree_ranks, "mixture", lambda _: "of a mixture")
    log_lines.lines.clear()
    with source_of(holding, names={"MODEL": "eagle"}, fingerprint="") as source:
        settings = from_source(source, DRAFT_MODEL="eagle")
        client = load_pair(models.get(kind.target), kind.speculative(models.get), None, draft=settings)
    assert log_lines.with_part("the client reports complete")
    assert log_lines.one("the default loader", "loads the draft: what was pulled is not kept: of a mixture")
    assert log_lines.one("rank 0: draft: loaded ", "not pulled: what was pulled is not kept: of a mixture")
    assert not log_lines.with_part("rank 0: draft: pulled "), "one line sums up a load"
    assert client.filled(kind) == seed.filled(kind)
    assert load_state_of(client.draft.model) == kind.state


def test_a_draft_in_the_files_of_its_target_is_named_by_model(models: ModelStore) -> None:
    _, source = seed_of("MTP", models)
    assert sync.probe(source, role="draft").announcement.identity.model == NAME
    serving.stop_server()
    _, source = seed_of("EAGLE", models)
    assert sync.probe(source, role="draft").announcement.identity.model == str(models.get("eagle"))


def test_facts_that_do_not_fit_the_tensors_are_refused(
    models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source announces other attributes to the pull than to the probe."""
    kind = KINDS["EAGLE"]
    seed, _ = seed_of("EAGLE", models)
    (holding,) = held("draft")
    monkeypatch.setattr(inspect_engine, "probe_sources", lambda *_: holding.announcement.identity)
    lie = {"has_own_embed_tokens": True, "has_own_lm_head": False}
    log_lines.lines.clear()
    with source_of(holding, load_state=lie) as source:
        client = load_pair(models.get(kind.target), kind.speculative(models.get), None, draft=from_source(source))
    assert "which does not fit the tensors" in log_lines.one("the default loader", "loads the draft")
    assert client.filled(kind) == seed.filled(kind)
    assert load_state_of(client.draft.model) == kind.state
