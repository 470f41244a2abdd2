"""Ranks exchange reports on their load, over real gloo groups in threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore, PrefixStore

from netloader.vllm.model.agreement import (
    REPORT_BYTES,
    AgreementError,
    Report,
    disagreement,
    exchange,
    load_digest,
    mixture,
    roots_wanted,
)

TIMEOUT = timedelta(seconds=60)


def group(store: Any, name: str, place: int, size: int) -> tuple[Any, int, int]:
    return dist.ProcessGroupGloo(PrefixStore(name, store), place, size, TIMEOUT), size, place


def rank_of_grid(store: Any, rank: int) -> tuple[Report, ...]:
    """One rank of tensor parallel 2 x pipeline parallel 2."""
    pipeline, tensor = divmod(rank, 2)
    groups = [group(store, f"tp{pipeline}", tensor, 2), group(store, f"pp{tensor}", pipeline, 2)]
    return exchange(Report("failed" if rank == 3 else "pulled", rank, root=f"{rank}" * 64), groups, 30)


def test_every_rank_of_a_grid_gets_all_reports_in_the_same_order() -> None:
    store = HashStore()
    with ThreadPoolExecutor(4, thread_name_prefix="rank") as pool:
        heard = list(pool.map(lambda rank: rank_of_grid(store, rank), range(4)))
    assert all(one == heard[0] for one in heard)
    assert [report.rank for report in heard[0]] == [0, 1, 2, 3]
    assert [report.outcome for report in heard[0]] == ["pulled"] * 3 + ["failed"]


def test_a_single_rank_gets_its_own_report() -> None:
    mine = Report("pulled", 0, root="a")
    assert exchange(mine, [(None, 1, 0), (None, 1, 0)], 1) == (mine,)


def test_a_rank_that_does_not_report_is_an_error_and_not_a_hang() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2, thread_name_prefix="rank") as pool:
        (present, *_), (absent, *_) = pool.map(lambda place: group(store, "tp", place, 2), range(2))
    with pytest.raises(AgreementError, match="did not report"):
        exchange(Report("pulled", 0), [(present, 2, 0)], 0.5)
    assert absent.size() == 2


# --- texts of any length --------------------------------------------------------------------------------------------

texts = st.text(max_size=600) | st.sampled_from(["f" * 5000, "\udcff" * 700, "\U0001f680" * 300])


@given(root=texts, load=texts, fingerprint=texts, reason=texts, rank=st.integers(0, 1 << 32), serves=st.booleans())
def test_a_report_fits_with_texts_of_any_length(
    root: str, load: str, fingerprint: str, reason: str, rank: int, serves: bool
) -> None:
    mine = Report("failed", rank, root=root, load=load, fingerprint=fingerprint, reason=reason, serves=serves)
    packed = mine.packed()
    assert len(packed) == REPORT_BYTES
    read = Report.unpacked(packed)
    assert (read.outcome, read.rank, read.serves) == ("failed", rank, serves)
    for name in ("root", "load", "fingerprint", "reason"):
        said = getattr(mine, name).encode(errors="replace").decode()
        assert said.startswith(getattr(read, name))
        assert getattr(read, name) or not said


def test_digests_are_not_cut() -> None:
    mine = Report("pulled", 3, root="a" * 64, load="b" * 64, fingerprint="c" * 64, reason="d" * 5000)
    read = Report.unpacked(mine.packed())
    assert (read.root, read.load, read.fingerprint) == (mine.root, mine.load, mine.fingerprint)


# --- one model, or none ---------------------------------------------------------------------------------------------

ROOTS = ("1a" * 16, "2b" * 16)
LOAD = load_digest(ROOTS)
F, G = "f0" * 16, "a1" * 16


def pulled(rank: int, load: str = LOAD, fingerprint: str = "", root: str = "") -> Report:
    return Report("pulled", rank, root=root or ROOTS[rank], load=load, fingerprint=fingerprint)


def default(rank: int, fingerprint: str = "", root: str = "") -> Report:
    return Report("default", rank, root=root, fingerprint=fingerprint)


def test_ranks_that_pulled_what_one_engine_holds_agree() -> None:
    assert disagreement([pulled(0), pulled(1)]) == ""
    assert disagreement([pulled(0, "")]) == "", "a rank alone has nothing to be mixed with"
    assert disagreement([default(0, F), default(1, G)]) == "", "nothing was pulled"


def test_sources_that_do_not_name_their_load_prove_nothing() -> None:
    assert "nothing shows that all ranks have weights of one model" in disagreement([pulled(0, ""), pulled(1, "")])
    assert "nothing shows" in disagreement([pulled(0, "", F), pulled(1, "")])
    assert disagreement([pulled(0, "", F), pulled(1, "", F)]) == "", "one checkpoint"
    assert "different loads (fingerprint: rank 0 has f0" in disagreement([pulled(0, "", F), pulled(1, "", G)])


@pytest.mark.parametrize("loads", [("", LOAD), (LOAD, "")])
def test_one_source_that_names_its_load_is_enough_if_that_is_what_was_pulled(loads: tuple[str, str]) -> None:
    assert disagreement([pulled(0, loads[0]), pulled(1, loads[1])]) == ""
    mixed = [pulled(0, loads[0]), pulled(1, loads[1], root="3c" * 16)]
    assert "did not pull what their sources hold together" in disagreement(mixed)


def test_weights_of_two_engines_are_refused_even_with_equal_fingerprints() -> None:
    reports = [pulled(0, "e" * 32, F), pulled(1, "d" * 32, F)]
    assert "different loads (load: rank 0 has eeee" in disagreement(reports)


def test_a_load_that_is_not_that_of_what_was_pulled_is_found() -> None:
    reports = [pulled(0), pulled(1, root="3c" * 16)]
    assert "did not pull what their sources hold together" in disagreement(reports)


def test_what_is_loaded_by_default_beside_a_pull_must_be_the_same_checkpoint() -> None:
    assert "different loads (fingerprint" in disagreement([pulled(0, LOAD, F), default(1, G)])
    assert "nothing shows" in disagreement([pulled(0, "", F), default(1)])
    assert disagreement([pulled(0, "", F), default(1, F)]) == ""
    assert disagreement([pulled(0), default(1)]) == "", "seen when it is loaded"


def test_weights_loaded_by_default_are_compared_with_those_of_the_source() -> None:
    assert mixture([pulled(0), default(1, root=ROOTS[1])]) == ""
    assert "rank 1 loaded other weights" in mixture([pulled(0), default(1, root="3c" * 16)])
    # Equal fingerprints do not prove the contrary, because a fingerprint covers samples only.
    assert "rank 1 loaded other weights" in mixture([pulled(0, LOAD, F), default(1, F, root="3c" * 16)])
    # A rank has no root, so the fingerprints decide.
    assert mixture([pulled(0, LOAD, F), default(1, F)]) == ""
    assert "nothing shows" in mixture([pulled(0), default(1)])
    assert mixture([default(0), default(1)]) == mixture([pulled(0), pulled(1)]) == ""


def test_roots_are_recorded_if_a_rank_needs_them() -> None:
    assert not roots_wanted([default(0), default(1)])
    assert not roots_wanted([pulled(0), pulled(1)])
    assert roots_wanted([pulled(0), default(1)])
    assert roots_wanted([default(0), Report("default", 1, serves=True)])


def test_the_digest_of_a_load_depends_on_places_and_needs_every_root() -> None:
    assert load_digest(ROOTS) != load_digest(ROOTS[::-1])
    assert load_digest(["a", ""]) == load_digest([]) == ""
