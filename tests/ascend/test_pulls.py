"""A real NPUWorker of vllm-ascend that serves on one simulated card, and two that pull from it: over hccl and over tcp.

Each kind of model is served with each setting. Both clients pull at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ascend import originals
from tests.ascend.cases import COPIES, LOSING, TRANSPORTS, Case, FromDisk
from tests.ascend.kinds import KINDS, OTHER, Store
from tests.ascend.pulls import Digests, Instance, differences, settings
from tests.ascend.table import PAGE

BLOCKS = 25
"""Of a server without copies, about so many, cut anywhere. The others have a few of the usual size."""

CASES = [Case(kind, setting) for kind in KINDS for setting in (*COPIES, "named" if kind in LOSING else "no")]
CASES += [Case("moe-w8a8", setting, 2) for setting in (*COPIES, "no")]
CASES += [Case("qwen3-moe", "no", 2)]

EXPERTS = ("qwen3-moe", "deepseek")
"""Kinds that are not quantised and change: INT8_CACHE asks for no copies of them."""


@dataclass(frozen=True)
class Pulled:
    """What the instances have, and what they logged.

    Attributes:
        seed: The instance that serves.
        held: What it has.
        clients: Those that pulled, by transport.
        got: What they have.
    """

    seed: Instance
    held: Sequence[Digests]
    clients: Mapping[str, Instance]
    got: Mapping[str, Sequence[Digests]]


@contextmanager
def pulled(case: Case, store: Store, folder: Path, suffix: str = "") -> Iterator[Pulled]:
    """Serve a model, and pull it over each transport into an instance that has no files, at the same time.

    Args:
        case: What is served.
        store: Has the files.
        folder: For the instances.
        suffix: OTHER for other weights at the server.
    """
    model = KINDS[case.kind].model

    def find(name: str) -> Path:
        return store.get(name + suffix)

    with (
        Instance.on(case.cards(0), folder / "seed") as seed,
        Instance.on(case.cards(1), folder / "hccl") as hccl,
        Instance.on(case.cards(2), folder / "tcp") as tcp,
    ):
        clients = dict(zip(TRANSPORTS, (hccl, tcp), strict=True))
        if case.setting not in COPIES:
            seed.all("prepare", blocks=BLOCKS)
        # Clients would be sent to each other otherwise.
        serving = settings(TRANSPORT=TRANSPORTS, FAN_OUT=0, **case.server)
        held = seed.load(find(model), case.arguments(find), serving)
        seed.profiled()
        addresses = seed.addresses()
        for transport, client in clients.items():
            sources = settings(addresses, TRANSPORT=transport, SERVE=False)
            client.begin_load(store.bare(model), case.arguments(store.bare), sources)
        got = {transport: client.answers() for transport, client in clients.items()}
        for client in clients.values():
            client.profiled()
        yield Pulled(seed, held, clients, got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pulls_end_in_the_model_of_a_disk_load(store: Store, from_disk: FromDisk, tmp_path: Path, case: Case) -> None:
    disk = from_disk(case.kind, case.ranks)
    with pulled(case, store, tmp_path) as found:
        assert not differences(found.held, disk)
        for transport, got in found.got.items():
            assert not differences(got, disk)
            for role in disk[0]["raw"]:
                for lines in found.clients[transport].lines(f"{role}: pulled", f"over {transport}"):
                    assert len(lines) == 1
        if case.ranks == 1:
            check_originals(case, found.seed, len(disk[0]["raw"]))


def check_originals(case: Case, seed: Instance, models: int) -> None:
    """Check that the lines with the address say that what the page says is kept, and nothing else."""
    written = originals.rows(PAGE.read_text(encoding="utf-8"))[KINDS[case.kind].title]
    assert originals.raw_bytes(seed, models) == written.raw
    if case.setting not in COPIES:
        assert originals.sums(seed) == (written.small, written.lost), "python -m tests.ascend.table writes it anew"
        return
    assert originals.kept(seed).keys() <= {f"INT8_CACHE={case.setting}"}
    assert sum(originals.sums(seed)) == (0 if case.kind in EXPERTS else written.uncomputed)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_were_kept_as_a_whole_if_they_were_not_computed(store: Store, tmp_path: Path, kind: str) -> None:
    """Control: without computing, the default KEEP_RAW holds all that changed."""
    case, chosen = Case(kind, "dram"), KINDS[kind]
    with Instance.on(case.cards(0), tmp_path / "seed") as seed:
        seed.all("prepare", computed=False)
        seed.load(store.get(chosen.model), case.arguments(store.get), settings(**case.server))
        written = originals.rows(PAGE.read_text(encoding="utf-8"))[chosen.title]
        assert originals.kept(seed) == {"KEEP_RAW": written.uncomputed}
        assert written.uncomputed > written.raw / 3


@pytest.mark.parametrize("kind", LOSING)
def test_what_is_lost_is_named_without_copies(store: Store, tmp_path: Path, kind: str) -> None:
    """`Case.server` copies these names and no others, and raw tensors are served. Without them processed ones are."""
    case, chosen = Case(kind, "no"), KINDS[kind]
    with Instance.on(case.cards(0), tmp_path / "seed") as seed:
        serving = settings(TRANSPORT=TRANSPORTS, **case.server)
        seed.load(store.get(chosen.model), case.arguments(store.get), serving)
        seed.profiled()
        (lines,) = seed.lines("target: no raw layout")
        assert len(lines) == 1, seed.engines[0].text()
        check_named(lines[0], chosen.lost)
        assert seed.addresses()


def check_named(line: str, lost: Sequence[str]) -> None:
    """Check that a line says how many tensors were left behind, which ones, and what to do."""
    first = [f"{name} (vLLM " for name in lost[:3]]
    assert f"left {len(lost)} raw tensors behind: {first[0]}" in line, line
    assert all(name in line for name in first), line
    assert f" and {len(lost) - 3} more (" in line, line
    assert "set INT8_CACHE to dram or hbm on the server" in line


OTHERS = ("llama", "qwen3-moe", "w8a8", "w4a8", "w4a4-flatquant", "moe-w4a8-old", "compressed-tensors", "mtp", "eagle")
"""Kinds that stand for the others: plain, computed, copied and dropped weights, experts, drafts."""


@pytest.mark.parametrize("kind", OTHERS)
def test_other_weights_at_the_seed_are_noticed(store: Store, from_disk: FromDisk, tmp_path: Path, kind: str) -> None:
    """Control for the comparison: nothing says which weights are meant, and the names of all tensors are equal."""
    disk = from_disk(kind, 1)
    with pulled(Case(kind, "dram"), store, tmp_path, OTHER) as found:
        for got in found.got.values():
            assert not differences(got, found.held)
            names = differences(got, disk)
            for role in disk[0]["raw"]:
                for stage in ("raw", "final"):
                    changed = [name for name in names if name.startswith(f"rank 0: {stage} {role} ")]
                    assert any(".o_proj.weight" in name for name in changed), (stage, role, names)
                    if kind.startswith("moe") or kind in {"qwen3-moe", "mtp"}:
                        assert any("experts.w2_weight" in name for name in changed), (stage, role, names)
