"""The seed is killed half-way through a pull: the clients read their files, and end in the model of a load from disk.

The seed sends the first half of its blocks and no more. It is killed once both clients have verified what came. It has
other weights than the files of the clients, which do not notice that, so that nothing of what was pulled may be left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.cases import LOSING, TRANSPORTS, Case, FromDisk
from tests.ascend.kinds import KINDS, OTHER, Store
from tests.ascend.processes import PATIENCE
from tests.ascend.pulls import Instance, differences, settings

BLOCKS, HOLD = 16, 7
TOLD = 0.25
"""The share of the bytes that a client has verified when it says so. Blocks up to HOLD are about half of them."""

NO_STALL: Mapping[str, Any] = {"STALL_TIMEOUT": PATIENCE}
CASES = [Case(kind, "named" if kind in LOSING else "no") for kind in KINDS]


@contextmanager
def half_way(
    case: Case, store: Store, folder: Path, suffix: str = OTHER, holding: Sequence[int] = (0,)
) -> Iterator[tuple[Instance, Mapping[str, Instance], Mapping[str, Mapping[str, int]]]]:
    """A seed, clients that are half-way, by transport, and the bytes that each has verified, of how many.

    Args:
        case: What is served.
        store: Has the files.
        folder: For the instances.
        suffix: OTHER for other weights at the seed, or nothing.
        holding: The ranks that stop; what the clients say is that of the first one's.
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
        for rank in holding:
            seed.engines[rank].call("prepare", blocks=BLOCKS, hold=HOLD)
        seed.load(
            find(model),
            case.arguments(find),
            settings(TRANSPORT=TRANSPORTS, FAN_OUT=0, **case.server, **NO_STALL),
        )
        seed.profiled()
        addresses = seed.addresses()
        for transport, client in clients.items():
            client.engines[holding[0]].call("prepare", tell=TOLD, fingerprint=not suffix)
            sources = settings(addresses, TRANSPORT=transport, SERVE=False, **NO_STALL)
            client.begin_load(store.get(model), case.arguments(store.get), sources)
        yield seed, clients, {transport: client.engines[holding[0]].answer() for transport, client in clients.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clients_of_a_killed_seed_end_in_the_model_of_a_disk_load(
    store: Store, from_disk: FromDisk, tmp_path: Path, case: Case
) -> None:
    disk = from_disk(case.kind, 1)
    with half_way(case, store, tmp_path) as (seed, clients, told):
        address = seed.addresses()[0]
        seed.engines[0].kill()
        for transport, client in clients.items():
            assert TOLD <= told[transport]["verified"] / told[transport]["total"] < 0.75
            assert not differences(client.answers(), disk)
            for role in disk[0]["raw"]:
                ((line,),) = client.lines(f"the default loader (auto) loads the {role}")
                assert address in line
                assert client.lines(f"{role}: pulled") == [[]]


def test_all_ranks_read_their_files_if_one_of_their_seeds_is_killed(
    store: Store, from_disk: FromDisk, tmp_path: Path
) -> None:
    case = Case("moe-w8a8", "no", 2)
    with half_way(case, store, tmp_path, "", holding=[1]) as (seed, clients, told):
        address = seed.addresses()[1]
        seed.engines[1].kill()
        for transport, client in clients.items():
            assert TOLD <= told[transport]["verified"] / told[transport]["total"] < 0.75
            assert not differences(client.answers(), from_disk(case.kind, case.ranks))
            (first,), (second,) = client.lines("the default loader (auto) loads the target")
            assert "rank 1" in first
            assert address in second
            assert client.lines("target: pulled")[1] == []
