"""Identities: each field that disagrees is named, and only those that forbid a pull forbid it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given

from netloader.core.identity import (
    MAX_SETTINGS,
    Difference,
    ModelIdentity,
    Severity,
    check_sendable,
    differences,
    is_digest,
    passed_on,
    quantised_unknown_how,
)
from netloader.errors import ConfigError
from tests.core.strategies import identities

FIELDS = ModelIdentity.__struct_fields__

BASE = ModelIdentity(
    model="m",
    architecture="LlamaForCausalLM",
    revision="r1",
    dtype="bfloat16",
    quantization="w8a8",
    quantization_config="c1",
    tp_size=4,
    pp_size=2,
    ep_size=2,
    expert_placement="p1",
    tied=True,
    load_state={"has_own_lm_head": True},
    engine="vllm 1",
    fingerprint="f1",
    load="l1",
)

OTHER: dict[str, Any] = {
    "model": "n",
    "architecture": "Qwen3ForCausalLM",
    "revision": "r2",
    "dtype": "float16",
    "quantization": "",
    "quantization_config": "c2",
    "layout": "processed",
    "role": "draft",
    "tp_size": 2,
    "tp_rank": 1,
    "pp_size": 1,
    "pp_rank": 1,
    "ep_size": 1,
    "ep_rank": 1,
    "expert_placement": "",
    "tied": False,
    "load_state": {"has_own_lm_head": False},
    "engine": "vllm 2",
    "fingerprint": "f2",
    "load": "l2",
    "names": {"MODEL": "n"},
    "settings": {},
    "processed_settings": {"a": "1"},
}

NOT_COMPARED = {"load", "names", "settings", "processed_settings"}
"""`names` is compared as a part of `model`, and only if both sides state it; settings are compared by their paths."""


SETTINGS = {"a.b", "a.c", "d"}
"""Paths of the settings that the strategy draws."""


def changed(base: ModelIdentity = BASE, **fields: Any) -> ModelIdentity:
    return msgspec.structs.replace(base, **fields)


def severities(ours: ModelIdentity, theirs: ModelIdentity) -> dict[str, Severity]:
    return {d.field: d.severity for d in differences(ours, theirs)}


def test_every_field_has_an_example() -> None:
    assert OTHER.keys() == set(FIELDS)


def test_the_load_digest_and_names_of_one_side_are_not_compared() -> None:
    assert {field for field in FIELDS if not differences(BASE, changed(**{field: OTHER[field]}))} == NOT_COMPARED


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in NOT_COMPARED])
def test_each_field_alone_is_named_with_both_values(field: str) -> None:
    theirs = changed(**{field: OTHER[field]})
    (found,) = [d for d in differences(BASE, theirs) if d.field == field]
    assert (found.ours, found.theirs) == (str(getattr(BASE, field)), str(OTHER[field]))
    assert field in str(found)
    assert repr(found.ours) in str(found)
    assert repr(found.theirs) in str(found)
    expected = Severity.WARN if field == "engine" else Severity.REFUSE
    assert found.severity is expected


@given(ours=identities, theirs=identities)
def test_differences_are_those_fields_and_look_the_same_from_both_sides(
    ours: ModelIdentity, theirs: ModelIdentity
) -> None:
    differing = {f for f in FIELDS if getattr(ours, f) != getattr(theirs, f)}
    if (ours.names, theirs.names) != (None, None):  # the names are compared instead of the text, or a path is no name
        differing = differing - {"model"} | ({"model"} & severities(ours, theirs).keys())
    found = severities(ours, theirs)
    for path in found.keys() & SETTINGS:
        assert found.pop(path) is Severity.REFUSE
    unknown = {"quantization_config"} if quantised_unknown_how(ours) or quantised_unknown_how(theirs) else set()
    assert found.keys() <= differing | unknown
    may_be_unknown = {"fingerprint", "engine", "tied", "load_state"}
    assert differing - found.keys() <= may_be_unknown | NOT_COMPARED
    back = severities(theirs, ours)
    assert found == {field: severity for field, severity in back.items() if field not in SETTINGS}
    itself = severities(ours, ours).keys()
    assert itself - {"model"} == ({"quantization_config"} if quantised_unknown_how(ours) else set())
    # A model that has only a path is not known to equal another one at that path, unless its fingerprint is known.
    assert "model" not in itself or (ours.names is not None and not ours.names.get("MODEL"))


@pytest.mark.parametrize(
    ("field", "unknown", "expected"),
    [
        ("fingerprint", "", None),  # a folder without weight files has none
        ("engine", "", None),
        ("tied", None, None),
        ("load_state", {}, None),
        ("revision", "", Severity.WARN),
        ("model", "", Severity.REFUSE),
        ("quantization", "", Severity.REFUSE),
    ],
)
def test_fields_that_one_side_does_not_know(field: str, unknown: Any, expected: Severity | None) -> None:
    assert severities(BASE, changed(**{field: unknown})).get(field) is expected


def test_each_setting_that_differs_is_named_by_its_path_with_both_values() -> None:
    ours = changed(settings={"same": "1", "a.b": "2", "only.ours": "3"})
    theirs = changed(settings={"same": "1", "a.b": "4"})
    assert differences(ours, theirs) == (Difference("a.b", "2", "4"), Difference("only.ours", "3", "not set"))


def test_settings_that_one_side_does_not_state_are_not_equal_to_any_that_do_something() -> None:
    assert differences(changed(settings={"a.b": "2"}), BASE) == (Difference("a.b", "2", "not stated"),)
    assert differences(BASE, changed(settings={"a.b": "2"})) == (Difference("a.b", "not stated", "2"),)
    assert differences(changed(settings={}), BASE) == ()


def test_the_configuration_file_is_compared_only_if_both_sides_know_theirs() -> None:
    path = "model_config.hf_config"
    one, two = changed(settings={path: "a"}), changed(settings={path: "b"})
    assert differences(one, two) == (Difference(path, "a", "b"),)
    for unknown in (changed(settings={}), BASE):
        assert differences(one, unknown) == differences(unknown, one) == ()


@pytest.mark.parametrize(
    "settings", [{str(number): "" for number in range(MAX_SETTINGS + 1)}, {"a": "b" * 257}, {"a": "\ud800"}]
)
@pytest.mark.parametrize("field", ["settings", "processed_settings"])
def test_settings_that_no_peer_accepts_are_found_before_they_are_sent(field: str, settings: dict[str, str]) -> None:
    """None are cut off, because those that are left would look equal."""
    stated: dict[str, Any] = {field: settings}
    with pytest.raises(ConfigError, match=field.upper()):
        check_sendable(changed(**stated))


@pytest.mark.parametrize("layout", ["raw", "checkpoint"])
def test_settings_of_processed_tensors_are_compared_only_in_that_layout(layout: str) -> None:
    ours, theirs = changed(processed_settings={"a": "1"}), changed(processed_settings={"a": "2"})
    assert differences(changed(ours, layout=layout), changed(theirs, layout=layout)) == ()
    ours, theirs = changed(ours, layout="processed"), changed(theirs, layout="processed")
    assert differences(ours, theirs) == (Difference("a", "1", "2"),)


@pytest.mark.parametrize("layout", ["raw", "processed"])
def test_an_unknown_quantisation_configuration_never_counts_as_equal(layout: str) -> None:
    """Two of them may hold tensors of equal names and types that mean different numbers."""
    ours = changed(quantization_config="", layout=layout)
    (found,) = differences(ours, ours)
    assert found == Difference("quantization_config", "not known", "not known", Severity.REFUSE)
    assert severities(ours, changed(ours, quantization_config="c1")) == {"quantization_config": Severity.REFUSE}
    assert severities(ours, changed(ours, quantization="")) == {
        "quantization": Severity.REFUSE,
        "quantization_config": Severity.REFUSE,
    }


@pytest.mark.parametrize("fields", [{"quantization": ""}, {"layout": "checkpoint"}])
def test_plain_models_and_checkpoints_need_no_quantisation_configuration(fields: dict[str, Any]) -> None:
    ours = changed(quantization_config="", **fields)
    assert differences(ours, ours) == ()


def test_processed_tensors_need_the_same_engine() -> None:
    ours = changed(layout="processed")
    assert severities(ours, changed(ours, engine="vllm 2")) == {"engine": Severity.REFUSE}
    assert severities(ours, changed(ours, engine="")) == {"engine": Severity.REFUSE}


def test_tying_decided_as_false_is_a_known_fact() -> None:
    assert severities(changed(tied=False), changed(tied=True)) == {"tied": Severity.REFUSE}


def test_long_values_are_shown_short() -> None:
    text = str(Difference("model", "a" * 100_000, "b"))
    assert len(text) < 400


TEXTS = [field for field in FIELDS if isinstance(OTHER[field], str) and field not in {"layout", "role"}]


@pytest.mark.parametrize("field", TEXTS)
def test_texts_on_the_wire_have_a_length_limit(field: str) -> None:
    most = 4096 if field == "model" else 64 if field in {"fingerprint", "load"} else 256
    for length in (most, most + 1, 1_000_000):
        said: dict[str, Any] = {field: "a" * length}
        encoded = msgspec.msgpack.encode(changed(**said))
        if length == most:
            assert getattr(msgspec.msgpack.decode(encoded, type=ModelIdentity), field) == "a" * most
        else:
            with pytest.raises(msgspec.ValidationError, match=rf"{field}"):
                msgspec.msgpack.decode(encoded, type=ModelIdentity)


def test_the_number_of_facts_on_the_wire_is_limited() -> None:
    settings = msgspec.msgpack.encode(changed(settings={str(number): "" for number in range(MAX_SETTINGS + 1)}))
    with pytest.raises(msgspec.ValidationError, match="settings"):
        msgspec.msgpack.decode(settings, type=ModelIdentity)
    many = msgspec.msgpack.encode(changed(load_state={str(number): True for number in range(65)}))
    with pytest.raises(msgspec.ValidationError, match="load_state"):
        msgspec.msgpack.decode(many, type=ModelIdentity)


@pytest.mark.parametrize("text", ["", "0", "9f" * 32])
def test_digests_are_hex(text: str) -> None:
    assert is_digest(text)


@pytest.mark.parametrize("text", ["0" * 65, "A", "0x1", "a\n", " ", "\uff11"])
def test_other_texts_are_not_digests(text: str) -> None:
    assert not is_digest(text)


# --- quantisation in words --------------------------------------------------------------------------------------------


def quantised(digest: str, settings: dict[str, str] | None) -> ModelIdentity:
    return changed(quantization="ascend", quantization_config=digest, settings=settings)


GROUPS = {"quantization.group_size": "64", "quantization.version": "1.0.0"}


def test_a_quantisation_that_differs_is_named_by_what_differs_in_it() -> None:
    ours, theirs = quantised("a1", GROUPS), quantised("b2", {"quantization.group_size": "32", "a.b": "1"})
    found = {d.field: (d.ours, d.theirs, d.severity) for d in differences(ours, theirs)}
    assert found == {
        "a.b": ("not set", "1", Severity.REFUSE),
        "quantization.group_size": ("64", "32", Severity.REFUSE),
        "quantization.version": ("1.0.0", "not set", Severity.REFUSE),
    }


@pytest.mark.parametrize("theirs", [None, {}, GROUPS, {"a.b": "1"}])
def test_the_digest_decides_whether_quantisations_differ(theirs: dict[str, str] | None) -> None:
    """Peers that do not say it in words, or say it as we do, are compared by the digest alone."""
    equal, other = quantised("a1", theirs), quantised("b2", theirs)
    of_path = {"a.b": Severity.REFUSE} if theirs and "a.b" in theirs else {}
    assert severities(quantised("a1", GROUPS), equal) == of_path
    assert severities(quantised("a1", GROUPS), other) == {"quantization_config": Severity.REFUSE} | of_path


def test_another_method_is_not_listed_setting_by_setting() -> None:
    theirs = changed(
        quantization="fp8", quantization_config="b2", settings={"quantization.activation_scheme": "static"}
    )
    assert severities(quantised("a1", GROUPS), theirs).keys() == {"quantization", "quantization_config"}


def test_a_relay_passes_on_the_configuration_file_that_only_its_source_knows() -> None:
    """Else a client with another file, which its source refuses, would pull the same weights from the relay."""
    path = "model_config.hf_config"
    source, client = changed(settings={path: "a"}), changed(settings={path: "b"})
    for own in (changed(settings={}), changed(settings={"code": "r2"}), BASE):
        relay = passed_on(own, source)
        assert relay.settings == {**(own.settings or {}), path: "a"}
        assert Difference(path, "b", "a") in differences(client, relay)
        assert passed_on(own, relay).settings == relay.settings, "and so on along a chain"
    assert passed_on(client, source).settings == {path: "b"}, "its own, if it knows that"
    unknown = changed(settings={"other": "1"})
    assert passed_on(BASE, unknown).settings is None
    assert passed_on(changed(settings={}), unknown).settings == {}
