from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.config import FORMAT_NAMES, Config, ConfigErrors, listen_port_for, load_config
from netloader.config.fields import FIELDS
from netloader.errors import ConfigError
from tests.configs import GOOD, HUGE, ROOT, entry, error_of, label

GUIDE = ("SOURCE", "MODEL", "LISTEN_PORT", "INT8_CACHE", "INT8_CACHE_NAME", "OUTPUT_PREFIX", "CONFIG_FILE")
DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"

# --- single fields ---------------------------------------------------------------------------------------------------


NOT_BOOLEANS: tuple[object, ...] = (None, 0, 1, "true", "", [], {})
NOT_TIMES: tuple[object, ...] = (
    *(None, True, "1", "", [], -1, -0.001, 604801, HUGE, -HUGE),
    *(float("nan"), float("inf"), float("-inf"), 1e300),
)
NOT_TEXT: tuple[object, ...] = (0, True, 1.5, [], ["a"], {}, "a\0b", "\ud800")


def each(name: str, *values: object) -> list[tuple[str, object]]:
    return [(name, value) for value in values]


BAD: list[tuple[str, object]] = [
    *each("SOURCE", 0, True, "a:1", {}, {"device_id": 0, "sources": []}, [None], [[]], ["a:1"], [0]),
    *each("MODEL", *NOT_TEXT, "", "  ", "m" * 4097),
    *each("LISTEN_PORT", True, False, 1.0, 19374.0, "", "x", "-5", "+5", " 80", "80²", "1e3", [], {}),
    ("LISTEN_PORT", "9" * 5000),
    *each("INT8_CACHE", None, "\ud800", "HBM", "Dram", "", "none", "yes", 0, False, ["no"]),
    *each("INT8_CACHE_NAME", "a.weight", 0, False, {}, {"a"}, [0], [None], [""], ["a", ["b"]], ["a\0"]),
    *each("OUTPUT_PREFIX", *NOT_TEXT),
    *each("CONFIG_FILE", *NOT_TEXT, ""),
    *each("FALLBACK", *NOT_BOOLEANS),
    *each("FALLBACK_FORMAT", None, 0, "", " ", "a b", "netloader", "netloader_p2p", "NetLoader", []),
    *each("FALLBACK_CONFIG", None, [], "{}", 0, {1: 2}, {"a": float("nan")}, {"a": object()}),
    *each("WAIT", *NOT_TIMES, 1200, 604800),
    *each("TIMEOUT", *NOT_TIMES, 0, 0.0, 1e-9),
    *each("STALL_TIMEOUT", *NOT_TIMES, 0, 0.0, 1e-9),
    *each("TRANSPORT", None, 0, True, "", [], {"tcp"}, [""], ["gloo", 0], ["gloo", "gloo"], ["auto", "tcp"], "a b"),
    *each("EXPECT_ROOT", 0, "", ROOT[:-1], ROOT + "0", "g" * 64, f"0x{ROOT[2:]}", []),
    *each("SERVE", *NOT_BOOLEANS),
    *each("LISTEN_HOST", 0, "", "host:80", "10.0.0.256", [], "a b"),
    *each("MAX_CLIENTS", None, 0, -1, True, 1.0, "8", []),
    *each("FAN_OUT", None, -1, True, 1.0, "1", []),
    *each("RELAY", *NOT_BOOLEANS),
    *each("RELAY_GRACE", *NOT_TIMES),
    *each("STRIPE", None, 0, -1, True, 1.0, "4", []),
    *each("KEEP_RAW", *NOT_BOOLEANS),
    *each("TOKEN_FILE", *NOT_TEXT, ""),
    *each("DRAFT_MODEL", *NOT_TEXT, "", "  ", "m" * 4097),
    *each("DISCOVERY", 0, True, "", " ", "redis", "redis //h", "dir:/a b", {"dir:/a"}, [""], ["dir:/a", 0], {}),
    *each("DISCOVERY", ["dir:/a", "dir:/a"], "dir:/a\0"),
    *each("MAX_BANDWIDTH", 0, -1, True, 1000, "", "fast", "500", "500MB", "1kB/s", "1e9B/s", []),
    *each("ZONE", 0, True, "", " ", "a b", "-a", "z" * 65, "zon\u00e9", []),
    *each("ORIGIN", None, 0, "", "Any", "one", [], "lease"),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD, ids=label)
def test_valid_values_are_accepted(name: str, value: object, expected: object) -> None:
    config = load_config({name: value})
    found = getattr(config, name.lower())
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("name", "value"), BAD, ids=label)
def test_invalid_values_are_refused_with_the_reason(name: str, value: object) -> None:
    error = error_of({name: value})
    assert error.field.startswith(name)
    assert str(error).startswith(f"{error.field} = ")
    assert f"allowed: {error.allowed}" in str(error)


def test_every_field_has_valid_and_invalid_examples() -> None:
    assert {name for name, *_ in GOOD} == set(FIELDS)
    assert {name for name, _ in BAD} == set(FIELDS)


def test_an_empty_configuration_has_all_defaults() -> None:
    assert load_config() == load_config(None) == load_config({}) == Config()
    assert load_config().warnings == ()


def test_every_field_is_an_attribute() -> None:
    assert {field.attribute for field in FIELDS.values()} <= set(Config.__struct_fields__)
    assert tuple(FIELDS)[: len(GUIDE)] == GUIDE


@pytest.mark.parametrize("extra", [[], "SOURCE", 0, False, [("MODEL", "a")]])
def test_a_configuration_has_to_be_an_object(extra: object) -> None:
    assert error_of(extra).allowed == "one object"


def test_a_configuration_does_not_follow_its_input() -> None:
    given = {"deep": {"a": 1}}
    config = load_config({"FALLBACK_CONFIG": given})
    given["deep"]["a"] = 2
    assert config.fallback_config == {"deep": {"a": 1}}
    assert Config().fallback_config is not Config().fallback_config


@pytest.mark.parametrize(
    ("field", "item"),
    [
        ("SOURCE[1].sources[0]", entry(1, "10.0.0.7")),
        ("SOURCE[1].sources[1]", entry(1, "a:1", "a:0")),
        ("SOURCE[1].sources[0]", {"device_id": 1, "sources": [7]}),
        ("SOURCE[1].sources", {"device_id": 1, "sources": "a:1"}),
        ("SOURCE[1].sources", {"device_id": 1, "sources": None}),
        ("SOURCE[1].device_id", {"device_id": "1", "sources": []}),
        ("SOURCE[1].device_id", {"device_id": True, "sources": []}),
        ("SOURCE[1].device_id", {"device_id": 1.0, "sources": []}),
        ("SOURCE[1].device_id", {"device_id": -1, "sources": []}),
        ("SOURCE[1].device_id", {"device_id": None, "sources": []}),
        ("SOURCE[1].device_id", entry(0, "b:1")),
        ("SOURCE[1]", {"sources": []}),
        ("SOURCE[1]", {"device_id": 1}),
        ("SOURCE[1].source", {"device_id": 1, "sources": [], "source": []}),
        ("SOURCE[1]", None),
        ("SOURCE[1]", []),
    ],
)
def test_a_fault_in_source_is_named_by_its_path(field: str, item: object) -> None:
    error = error_of({"SOURCE": [entry(0, "a:1"), item]})
    assert error.field == field
    assert not isinstance(error, ConfigErrors)


def test_a_repeated_device_id_names_both_places() -> None:
    message = str(error_of({"SOURCE": [entry(3, "a:1"), entry(0, "a:1"), entry(3, "b:1")]}))
    assert "SOURCE[2].device_id = 3" in message
    assert "SOURCE[0] has this device_id already" in message


# --- unknown fields and several faults -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("source", "did you mean SOURCE?"),
        ("SOURCES", "did you mean SOURCE?"),
        ("LISTENPORT", "did you mean LISTEN_PORT?"),
        ("Int8_Cache", "did you mean INT8_CACHE?"),
        ("enable_multithread_load", "FALLBACK_CONFIG"),
        ("zzz", ""),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(key: str, hint: str) -> None:
    error = error_of({key: 17})
    assert f"{key} = 17 is not valid: unknown field" in str(error)
    assert hint in error.hint
    assert bool(hint) == bool(error.hint)
    for name in FIELDS:
        assert name in error.allowed


@pytest.mark.parametrize("key", [0, None, ("a",), "\0", "a" * 10_000, "\ud800"])
def test_a_key_that_is_not_a_field_name_is_refused(key: object) -> None:
    error = error_of({key: 1})
    assert "unknown field" in str(error)
    assert len(str(error)) < 1000
    assert str(error).isprintable()


def test_all_faults_are_reported_at_once() -> None:
    error = error_of(
        {
            "FALLBACK": "yes",
            "SOURCE": [entry(0, "a"), entry(-1, "b:1", "c")],
            "LISTEN_PRT": 1,
            "MODEL": "fine",
            "WAIT": -1,
        }
    )
    assert isinstance(error, ConfigErrors)
    fields = ["FALLBACK", "SOURCE[0].sources[0]", "SOURCE[1].device_id", "SOURCE[1].sources[1]", "LISTEN_PRT", "WAIT"]
    assert [problem.field for problem in error.problems] == fields
    assert error.field == "FALLBACK"
    assert error.value == "yes"
    for number, problem in enumerate(error.problems, 1):
        assert f"{number}. {problem}" in str(error)
    assert "MODEL =" not in str(error)


def test_faults_that_concern_several_fields_or_a_file_are_reported_at_once(tmp_path: Path) -> None:
    error = error_of({"WAIT": 60, "TIMEOUT": 60, "TOKEN_FILE": str(tmp_path / "missing")})
    assert isinstance(error, ConfigErrors)
    assert [problem.field for problem in error.problems] == ["WAIT", "TOKEN_FILE"]


def test_a_huge_value_gives_a_short_message() -> None:
    assert len(str(error_of({"FALLBACK": "x" * 100_000}))) < 500
    assert "too large to show" in str(error_of({"FALLBACK": HUGE}))


# --- rank: sources and port ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "SOURCE omitted"),
        ([], "SOURCE is empty"),
        ([entry(1, "a:1"), entry(0, "a:1")], "SOURCE has no entry for rank 3; it has 0, 1"),
        ([entry(3)], "SOURCE lists no address for rank 3"),
        ([entry(rank + 4, "a:1") for rank in range(20)], "16, 17, 18, 19 and 4 more"),
        ([entry(HUGE, "a:1")], "too large to show"),
    ],
    ids=label,
)
def test_a_rank_without_sources_gets_the_reason(source: object, reason: str) -> None:
    config = load_config({"SOURCE": source})
    assert config.sources_for(3) == ()
    assert reason in (config.why_no_source(3) or "")


def test_a_rank_gets_its_own_sources_in_order() -> None:
    config = load_config({"SOURCE": [entry(0, "a:1"), entry(3, "z:1", "b:1")]})
    assert [str(address) for address in config.sources_for(3)] == ["z:1", "b:1"]
    assert config.why_no_source(3) is None
    assert [str(address) for address in config.sources_for(0)] == ["a:1"]


@pytest.mark.parametrize(
    ("base", "rank", "port"),
    [
        (None, 0, 0),
        (None, 7, 0),
        (1024, 0, 1024),
        (1023, 1, 1024),
        (65535, 0, 65535),
        ("65530", 5, 65535),
        (19374, 3, 19377),
    ],
)
def test_a_port_within_the_bounds(base: object, rank: int, port: int) -> None:
    decision = listen_port_for(load_config({"LISTEN_PORT": base}), rank)
    assert decision.port == port
    assert decision.listens
    assert decision.warning is None


@pytest.mark.parametrize(
    ("base", "rank", "total"),
    [
        (1023, 0, "1023 + 0 = 1023"),
        (0, 0, "0 + 0 = 0"),
        ("0", 0, "0 + 0 = 0"),
        (-5, 1, "-5 + 1 = -4"),
        (65535, 1, "65535 + 1 = 65536"),
        (70000, 0, "70000 + 0 = 70000"),
        (HUGE, 0, "too large to show"),
    ],
    ids=label,
)
def test_a_port_out_of_bounds_disables_the_listener_only(base: object, rank: int, total: str) -> None:
    decision = listen_port_for(load_config({"LISTEN_PORT": base}), rank)
    assert decision.port is None
    assert not decision.listens
    assert decision.warning is not None
    assert total in decision.warning
    assert "1024-65535" in decision.warning


@given(st.integers(-(10**6), 10**6), st.integers(0, 10**5))
def test_a_port_is_the_sum_or_none(base: int, rank: int) -> None:
    decision = listen_port_for(load_config({"LISTEN_PORT": base}), rank)
    assert decision.port == (base + rank if 1024 <= base + rank <= 65535 else None)
    assert (decision.warning is None) == decision.listens


def test_a_worker_that_does_not_serve_needs_no_port() -> None:
    decision = listen_port_for(load_config({"SERVE": False, "LISTEN_PORT": 1}), 0)
    assert decision.port is None
    assert decision.reason == "SERVE is false"
    assert decision.warning is None


# --- fields that depend on each other --------------------------------------------------------------------------------


def test_waiting_fits_into_the_timeout() -> None:
    error = error_of({"WAIT": 60, "TIMEOUT": 60})
    assert error.field == "WAIT"
    assert "TIMEOUT (60 s)" in error.allowed
    assert load_config({"WAIT": 3600, "TIMEOUT": 4000}).wait == 3600


LEASE = {"ORIGIN": "lease", "DISCOVERY": "redis://h"}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"ORIGIN": "lease"}, "there is no DISCOVERY"),
        ({"ORIGIN": "lease", "DISCOVERY": []}, "there is no DISCOVERY"),
        (LEASE | {"SERVE": False}, "SERVE is false"),
    ],
)
def test_an_origin_by_lease_needs_a_registry_and_a_server(extra: dict[str, object], reason: str) -> None:
    assert load_config(LEASE).origin == "lease"
    error = error_of(extra)
    assert error.field == "ORIGIN"
    assert reason in str(error)
    assert error.hint


@pytest.mark.parametrize(
    "given",
    [
        "redis://user:{}@host:6379/0",
        ["dir:/a", "redis://:{}@host"],
        "etcd://host?password={}",
        "redis://user:{}@host white space",  # refused
        ["redis://user:{}@host"] * 2,  # refused
        "user:{}@host",  # refused: no scheme, or one that is not known
        ["//user:{}@host"],  # refused
    ],
)
def test_no_password_of_a_registry_is_shown(given: str | list[str], tmp_path: Path) -> None:
    password = "hunter2"
    value = given.format(password) if isinstance(given, str) else [one.format(password) for one in given]
    file = tmp_path / "netloader.json"
    file.write_text(json.dumps({"DISCOVERY": value}))
    for extra in ({"DISCOVERY": value}, {"DISCOVERY": value, "CONFIG_FILE": str(file)}):
        try:
            config = load_config(extra)
        except ConfigError as error:
            said = f"{error} {error.value!r} {error!r}"
        else:
            urls = [url.reveal() for url in config.discovery or ()]
            assert urls == [value] if isinstance(value, str) else urls == value
            said = f"{config} {config!r} {config.overrides} {config.discovery} {list(map(str, config.discovery or ()))}"
        assert password not in said
        assert "host" in said or "not shown" in said


def test_names_without_a_cache_log_a_warning() -> None:
    assert "INT8_CACHE_NAME" in load_config({"INT8_CACHE_NAME": ["a"]}).warnings[0]
    assert load_config({"INT8_CACHE_NAME": ["a"], "INT8_CACHE": "dram"}).warnings == ()


def test_netloader_never_falls_back_to_itself() -> None:
    for name in FORMAT_NAMES:
        assert "cannot fall back to itself" in str(error_of({"FALLBACK_FORMAT": name.upper()}))


# --- anything at all -------------------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SOURCES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "device_id": st.integers(-1, 3) | JSON,
            "sources": st.lists(st.sampled_from(["a:1", "[::1]:2", "a", "a:0"]) | JSON, max_size=3) | JSON,
            "other": JSON,
        },
    )
    | JSON,
    max_size=4,
)
ANYTHING = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=12), JSON | SOURCES, max_size=6)


def parses_or_refuses(extra: Any) -> None:
    config, error = None, None
    try:
        config = load_config(extra)
    except ConfigError as caught:
        error = caught
    if config is None:
        assert error is not None
        assert error.field
        assert error.allowed
        assert str(error)
    else:
        assert repr(config)
        for rank in range(4):
            assert (config.why_no_source(rank) is None) == bool(config.sources_for(rank))
            assert listen_port_for(config, rank).reason


@given(ANYTHING)
@example({"SOURCE": [{"device_id": 0}]})
def test_any_json_is_a_configuration_or_a_config_error(extra: dict[str, Any]) -> None:
    parses_or_refuses(extra)


@given(ANYTHING | JSON)
def test_any_json_in_the_file_is_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, contents: object
) -> None:
    path = tmp_path_factory.mktemp("config") / "netloader.json"
    path.write_text(json.dumps(contents))
    parses_or_refuses({"CONFIG_FILE": str(path)})


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0 \nNaInfty\\', max_size=60).map(str.encode))
def test_any_bytes_in_the_file_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, contents: bytes
) -> None:
    path = tmp_path_factory.mktemp("config") / "netloader.json"
    path.write_bytes(contents)
    parses_or_refuses({"CONFIG_FILE": str(path)})


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_lists_every_field_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| [^|]+ \| `([^|]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(FIELDS)
    for name, default in rows:
        assert load_config({name: json.loads(default)}) == Config(), name


def test_the_examples_of_the_document_are_valid() -> None:
    text = DOCUMENT.read_text()
    blocks = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"--model-loader-extra-config '([^']+)'", text)
    assert len(blocks) >= 3
    assert len(inline) >= 3
    for block in blocks + inline:
        fields = json.loads(block)
        for name in ("CONFIG_FILE", "TOKEN_FILE"):  # of the reader's machine
            assert isinstance(fields.pop(name, ""), str)
        load_config(fields)
