"""The key of a model: equal for all that may match, other for all that are refused by what is known before loading."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from netloader.core.identity import OF_QUANTIZATION, ModelIdentity, Severity, differences, known_before_loading
from netloader.core.model_key import key_of, rank_of
from tests.core.strategies import identities
from tests.core.test_identity import BASE

COVERED = (
    *("architecture", "dtype", "quantization", "quantization_config", "role"),
    *("tp_size", "tp_rank", "pp_size", "pp_rank", "ep_size", "ep_rank"),
)
LABELS: dict[str, Any] = {
    "model": "another",
    "names": {"served": "another"},
    "revision": "another",
    "fingerprint": "another",
    "load": "another",
    "engine": "another",
    "expert_placement": "another",
    "tied": False,
    "load_state": {},
    "processed_settings": {"a": "b"},
    "layout": "processed",
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ModelIdentity, ModelIdentity]:
    """Two identities that differ in a few fields."""
    ours, other = draw(identities), draw(identities)
    fields = draw(st.lists(st.sampled_from(ModelIdentity.__struct_fields__), max_size=3))
    return ours, msgspec.structs.replace(ours, **{field: getattr(other, field) for field in fields})


def known_differences(ours: ModelIdentity, theirs: ModelIdentity) -> set[str]:
    """The fields and settings that forbid a pull and are known before the model is built."""
    paths = {*(ours.settings or {}), *(theirs.settings or {})}
    refused = {found.field for found in differences(ours, theirs) if found.severity is Severity.REFUSE}
    if any(field.startswith(OF_QUANTIZATION) for field in refused):
        refused.add("quantization_config")  # stated in words
    if ours.quantization_config == theirs.quantization_config:
        refused.discard("quantization_config")  # neither knows it, so that both have one key and are refused
    if {ours.layout, theirs.layout} == {"raw", "processed"}:
        refused.discard("layout")
    return refused & {*COVERED, "layout", *(path for path in paths if not path.startswith(OF_QUANTIZATION))}


@given(pairs())
def test_keys_differ_if_and_only_if_something_known_before_loading_forbids_a_pull(
    pair: tuple[ModelIdentity, ModelIdentity],
) -> None:
    assert (key_of(pair[0]) != key_of(pair[1])) == bool(known_differences(*pair))


@given(identities, st.data())
def test_one_field_that_is_covered_makes_another_key(identity: ModelIdentity, data: st.DataObject) -> None:
    other = data.draw(identities)
    field = data.draw(st.sampled_from(COVERED))
    assume(getattr(identity, field) != getattr(other, field))
    changed = msgspec.structs.replace(identity, **{field: getattr(other, field)})
    assert key_of(changed) != key_of(identity)


@pytest.mark.parametrize("field", LABELS)
def test_what_is_a_label_or_not_known_before_loading_makes_no_other_key(field: str) -> None:
    assert key_of(msgspec.structs.replace(BASE, **{field: LABELS[field]})) == key_of(BASE)


def test_every_field_is_covered_or_is_left_out_on_purpose() -> None:
    assert set(COVERED) | set(LABELS) | {"settings"} == set(ModelIdentity.__struct_fields__)
    assert set(COVERED) | {"layout"} == {field for field in known_before_loading(BASE) if "." not in field}


def test_settings_make_another_key_unless_only_one_side_may_know_them() -> None:
    with_one = msgspec.structs.replace(BASE, settings={"parallel_config.x": "1"})
    assert key_of(with_one) != key_of(BASE)
    assert key_of(msgspec.structs.replace(BASE, settings={})) == key_of(BASE)
    for path in ("model_config.hf_config", f"{OF_QUANTIZATION}bits"):
        assert key_of(msgspec.structs.replace(BASE, settings={path: "1"})) == key_of(BASE)


def test_the_key_is_the_same_in_every_process() -> None:
    code = "from tests.core.test_identity import BASE; from netloader.core.model_key import key_of; print(key_of(BASE))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()
        for _ in range(2)
    }
    assert outputs == {key_of(BASE)}
    # Recorded: if it changes, KEY_VERSION has to change.
    assert key_of(ModelIdentity()) == "1-4795c4a9965d58c56c328c16515eca886776799e"


def test_a_rank_finds_its_share_in_every_replica_unless_experts_are_spread_over_them() -> None:
    share = ModelIdentity(tp_size=4, tp_rank=3, pp_size=2, pp_rank=1)
    assert rank_of(share) == rank_of(share, 7) == rank_of(share, 15) == 7
    assert rank_of(msgspec.structs.replace(share, ep_size=4, ep_rank=3), 15) == 7
    assert rank_of(msgspec.structs.replace(share, ep_size=8, ep_rank=7), 15) == 15


def test_a_setting_that_is_no_text_has_a_key_of_its_own() -> None:
    """It can't be sent, and is refused by name for that; finding its key ends nothing."""
    odd = [msgspec.structs.replace(BASE, settings={"additional_config.x": text}) for text in ("\udc80", "\udc81", "?")]
    assert len({key_of(identity) for identity in odd}) == 3
