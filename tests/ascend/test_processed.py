"""Processed weights under vllm-ascend: post-processed once at the client, filled by the pull, equal to a disk load.

The servers keep no copies (`INT8_CACHE` `no`, `KEEP_RAW` `false`). Where the raw tensors are lost, they serve processed
ones. For the other kinds of models, a change of the server's process withholds the raw layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from netloader.vllm.model.ascend_table import METHODS, RELEASE, SCHEMES
from tests.ascend import table
from tests.ascend.kinds import KINDS, Store
from tests.ascend.processes import EngineFailed
from tests.ascend.pulls import Digests, Instance, differences, settings

NO_COPIES: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False}

LOST = (
    "w4a8",
    "w4a8-old",
    "w4a4",
    "w4a4-flatquant",
    "moe-w4a8",
    "moe-w4a8-group",
    "moe-w4a8-old",
    "deepseek-w8a8-consumer",
)
"""Kinds whose raw tensors are not all computed from processed ones."""

FALLBACK = "could not pull: processed weights"

FromDisk = Callable[[str, int], "Loaded"]


@dataclass(frozen=True)
class Case:
    """One pull.

    Attributes:
        kind: The kind of model.
        transport: The setting.
        ranks: Of each instance.
        arguments: Of all engines, besides those of the kind.
    """

    kind: str
    transport: str
    ranks: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind, self.transport, *(["ranks"] if self.ranks > 1 else [])])


TWO_RANKS: Mapping[str, Any] = {"enable_expert_parallel": True}
DRAFTS = ("mtp", "eagle")
"""Kinds with a draft, which shares tensors with its target, and is served raw only."""

CASES = [
    *(Case(kind, "hccl") for kind in KINDS if kind not in DRAFTS),
    *(Case(kind, "tcp") for kind in LOST),
    Case("moe-w4a8-old", "hccl", 2, TWO_RANKS),
]


@dataclass(frozen=True)
class Loaded:
    """An instance's final tensors and plain values, by rank."""

    tensors: Sequence[Digests]
    values: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, instance: Instance, digests: Sequence[Digests]) -> Loaded:
        """What an instance that has loaded holds. Its raw tensors are not known, if it pulled processed ones."""
        return cls([{"final": rank["final"]} for rank in digests], instance.all("values"))

    def differences(self, other: Loaded) -> list[str]:
        """Names of the tensors and plain values that differ."""
        names = differences(self.tensors, other.tensors)
        for rank, (ours, theirs) in enumerate(zip(self.values, other.values, strict=True)):
            for role in ours.keys() | theirs.keys():
                left, right = ours.get(role, {}), theirs.get(role, {})
                found = sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))
                names += [f"rank {rank}: value {role} {name}" for name in found]
        return names


@dataclass(frozen=True)
class Pull:
    """What the two instances hold, and the lines that they logged."""

    seed: Loaded
    client: Loaded
    served: list[list[str]]
    lines: Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def from_disk(store: Store, tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """Loads a kind of model from its files, once."""

    @functools.cache
    def load(kind: str, ranks: int) -> Loaded:
        chosen = KINDS[kind]
        with Instance.on(range(4, 4 + ranks), tmp_path_factory.mktemp("disk") / "ranks") as instance:
            arguments = {**chosen.arguments(store.get), **(TWO_RANKS if ranks > 1 else {})}
            return Loaded.of(instance, instance.load(store.get(chosen.model), arguments))

    return load


def pull(
    case: Case,
    store: Store,
    folder: Path,
    served: str = "",
    *,
    spoiled: str = "",
    files: bool = False,
    at_seed: Sequence[str] = (),
    at_client: Sequence[str] = (),
) -> Pull:
    """Serve processed weights, and pull them.

    Args:
        case: The case.
        store: Has the models.
        folder: For the instances.
        served: Another model to serve.
        spoiled: A tensor of which the server has other bytes than it announced.
        files: Whether the client has the files of the model, to fall back to.
        at_seed, at_client: Changes of the processes, before they load.
    """
    kind = KINDS[case.kind]
    with (
        Instance.on(range(case.ranks), folder / "seed") as seed,
        Instance.on(range(2, 2 + case.ranks), folder / "client") as client,
    ):
        for instance, changes in ((seed, at_seed), (client, at_client)):
            for what in changes:
                instance.all("change", change=what)
        serving = settings(TRANSPORT=case.transport, **NO_COPIES)
        arguments = {**kind.arguments(store.get), **case.arguments}
        theirs = Loaded.of(seed, seed.load(store.get(served or kind.model), arguments, serving))
        seed.profiled()
        if spoiled:
            seed.all("spoil", tensor=spoiled)
        sources = settings(seed.addresses(), TRANSPORT=case.transport, SERVE=False)
        model, find = (store.get(kind.model), store.get) if files else (store.bare(kind.model), store.bare)
        digests = client.load(model, {**kind.arguments(find), **case.arguments}, sources)
        client.profiled()
        return Pull(theirs, Loaded.of(client, digests), seed.lines("serves target"), client.lines)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pulled_processed_is_what_a_disk_load_makes(
    store: Store, from_disk: FromDisk, tmp_path: Path, case: Case
) -> None:
    withheld = () if case.kind in LOST else ("no_raw_target",)
    found, disk = pull(case, store, tmp_path, at_seed=withheld), from_disk(case.kind, case.ranks)
    for lines in found.served:
        assert ["processed layout" in line for line in lines] == [True]
    for lines in found.lines("target: pulled", f"over {case.transport}"):
        assert len(lines) == 1
    assert not found.client.differences(disk)
    assert not found.seed.differences(disk)


def test_other_weights_at_the_seed_are_noticed(store: Store, from_disk: FromDisk, tmp_path: Path) -> None:
    """Control for the comparison: nothing says which weights are meant, and the names of all tensors are equal."""
    found = pull(Case("w8a8", "hccl"), store, tmp_path, served="w8a8-other", at_seed=["no_raw_target"])
    assert not found.client.differences(found.seed)
    names = set(found.client.differences(from_disk("w8a8", 1)))
    layer = "rank 0: final target model.layers.0.self_attn.qkv_proj"
    assert {f"{layer}.weight", f"{layer}.weight_scale"} <= names


@pytest.mark.parametrize("kind", ["w4a4-flatquant", "deepseek-w8a8-consumer", "moe-w4a8-old"])
def test_a_failed_pull_ends_in_what_a_clean_load_gives(
    store: Store, from_disk: FromDisk, tmp_path: Path, kind: str
) -> None:
    """The model has the structure of processed weights then: it is built again, and filled from its files."""
    found = pull(Case(kind, "hccl"), store, tmp_path, spoiled=LAST[kind], files=True)
    assert len(found.lines("loads the target", FALLBACK, "arrived with digest")[0]) == 1, found.lines("netloader")
    assert len(found.lines("the model is built anew")[0]) == 1
    assert not found.client.differences(from_disk(kind, 1))
    assert found.seed.differences(from_disk(kind, 1)) == []


LAST = {
    "w4a4-flatquant": "model.layers.3.mlp.down_proj.weight_packed",
    "deepseek-w8a8-consumer": "model.layers.1.self_attn.mla_attn.mla_attn.impl.deq_scale_qkv",
    "moe-w4a8-old": "model.layers.1.mlp.experts.w2_weight",
}
"""A tensor of the last layer. Blocks of those before it have arrived."""


def test_a_model_that_is_built_again_leaves_no_layers_behind(store: Store, tmp_path: Path) -> None:
    """vllm-ascend notes each layer with experts, and numbers them: by its number a layer finds its expert map."""
    kind, counts = KINDS["moe-w4a8-old"], []
    with Instance.on([0], tmp_path / "seed") as seed, Instance.on([1], tmp_path / "client") as client:
        seed.load(store.get(kind.model), {}, settings(TRANSPORT="hccl", **NO_COPIES))
        seed.profiled()
        seed.all("spoil", tensor=LAST["moe-w4a8-old"])
        client.load(store.get(kind.model), {}, settings(seed.addresses(), TRANSPORT="hccl", SERVE=False))
        assert len(client.lines("the model is built anew")[0]) == 1
        counts = [seed.all("built"), client.all("built")]
    assert counts[0] == counts[1]
    assert counts[0][0]["numbers"] == list(range(counts[0][0]["noted"]))


@pytest.mark.parametrize("kind", ["w8a8", "w4a8-old", "w4a4-flatquant"])
def test_a_second_post_processing_ends_the_load(store: Store, tmp_path: Path, kind: str) -> None:
    """Control: without what keeps it away, the load fails, because the tensors or the attributes are not as pulled."""
    withheld = () if kind in LOST else ("no_raw_target",)
    with pytest.raises(EngineFailed, match=r"NotAdopted: post-processing changed tensors|AttributeError|RuntimeError"):
        pull(Case(kind, "hccl"), store, tmp_path, at_seed=withheld, at_client=["post_process_twice"])


def test_values_that_are_read_from_tensors_are_computed_again(store: Store, tmp_path: Path) -> None:
    """Control: else they would be those of the zeros with which the client post-processed."""
    found = pull(Case("w4a4-flatquant", "hccl"), store, tmp_path, files=True, at_client=["nothing_recomputed"])
    assert len(found.lines("loads the target", FALLBACK, "plain values differ", "aclnn_clip_ratio")[0]) == 1


def test_values_that_differ_between_engines_are_left_out(store: Store, from_disk: FromDisk, tmp_path: Path) -> None:
    found = pull(Case("moe-w4a8", "hccl"), store, tmp_path, at_client=["other_harmless_values"])
    assert len(found.lines("target: pulled")[0]) == 1
    assert not found.client.differences(from_disk("moe-w4a8", 1))


def test_if_they_counted_nothing_would_be_kept(store: Store, tmp_path: Path) -> None:
    """Control for the test above."""
    changes = ["other_harmless_values", "harmless_counts"]
    found = pull(Case("moe-w4a8", "hccl"), store, tmp_path, files=True, at_seed=["harmless_counts"], at_client=changes)
    assert len(found.lines("loads the target", FALLBACK, "plain values differ", "moe_instance_id")[0]) == 1


UNKNOWN = {
    "another_release": "processed weights are known for vllm 0.23.0, vllm-ascend 0.22.0, not for vllm 0.23.0",
    "a_derived_scheme": "tests.ascend.changes.Derived is not in the table of vllm-ascend's methods",
    "a_replaced_method": "its post-processing was replaced by tests.ascend.changes.",
}


@pytest.mark.parametrize("change", UNKNOWN)
def test_a_server_refuses_by_name_what_is_not_known(store: Store, tmp_path: Path, change: str) -> None:
    with Instance.on([0], tmp_path / "seed") as seed:
        for each in ("no_raw_target", change):
            seed.all("change", change=each)
        seed.load(store.get("w8a8"), {}, settings(TRANSPORT="hccl", **NO_COPIES))
        assert len(seed.lines("does not serve its target", UNKNOWN[change])[0]) == 1, seed.engines[0].text()


@pytest.mark.parametrize("change", UNKNOWN)
def test_a_client_refuses_by_name_what_is_not_known(store: Store, tmp_path: Path, change: str) -> None:
    """Its source does not know better."""
    found = pull(Case("w8a8", "hccl"), store, tmp_path, files=True, at_seed=["no_raw_target"], at_client=[change])
    assert len(found.lines("loads the target", FALLBACK, UNKNOWN[change])[0]) == 1
    assert not found.lines("the model is built anew")[0], "nothing was post-processed"


def test_another_kind_of_card_is_refused_for_processed_weights(store: Store, tmp_path: Path) -> None:
    """Operators pack weights for it, into tensors of the same shape."""
    found = pull(Case("w4a4", "hccl"), store, tmp_path, files=True, at_client=["another_card"])
    assert len(found.lines("loads the target", FALLBACK, "ascend_device_type is 'A2'")[0]) == 1, found.lines(FALLBACK)


def test_the_table_has_the_methods_and_the_releases_of_the_documentation() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    shown = {name for row in page.splitlines() for name in row.split(" | ")[1:2] if name.startswith("Ascend")}
    listed = {name.rpartition(".")[2] for name in (*SCHEMES, *METHODS)}
    assert shown <= listed
    assert {name.rpartition(".")[2] for name in SCHEMES} <= shown
    assert f"vLLM {RELEASE[0]}, {RELEASE[1]}." in page
