from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.config import Config, ConfigErrors, Token, load_config
from netloader.config.fields import FIELDS
from netloader.core.addresses import Address
from tests.configs import GOOD, HUGE, ROOT, SECRET, entry, error_of


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a CONFIG_FILE; returns its path."""

    def write(contents: object, name: str = "netloader.json") -> str:
        path = tmp_path / name
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return str(path)

    return write


# --- CONFIG_FILE -----------------------------------------------------------------------------------------------------


def test_every_field_of_the_file_takes_precedence(write: Any, tmp_path: Path) -> None:
    tokens = [tmp_path / "inline", tmp_path / "file"]
    for number, token in enumerate(tokens):
        token.write_text(f"{SECRET} {number}")
        token.chmod(0o600)
    pairs: dict[str, tuple[object, object]] = {
        "SOURCE": ([entry(0, "a:1")], [entry(0, "b:1")]),
        "MODEL": ("a", "b"),
        "LISTEN_PORT": (2000, "3000"),
        "INT8_CACHE": ("dram", "hbm"),
        "INT8_CACHE_NAME": (["a"], None),
        "OUTPUT_PREFIX": ("a", ""),
        "FALLBACK": (True, False),
        "FALLBACK_FORMAT": ("auto", "dummy"),
        "FALLBACK_CONFIG": ({"a": 1}, {"b": 2}),
        "WAIT": (1, 0),
        "TIMEOUT": (10, 20),
        "STALL_TIMEOUT": (3, 4),
        "TRANSPORT": ("gloo", ["tcp"]),
        "EXPECT_ROOT": ("0" * 64, ROOT),
        "SERVE": (True, False),
        "LISTEN_HOST": ("a", "b"),
        "MAX_CLIENTS": (3, 4),
        "FAN_OUT": (0, 2),
        "RELAY": (True, False),
        "RELAY_GRACE": (1, 2),
        "STRIPE": (1, 2),
        "KEEP_RAW": (False, True),
        "TOKEN_FILE": (str(tokens[0]), str(tokens[1])),
        "DRAFT_MODEL": ("a", "b"),
        "DISCOVERY": ("dir:/a", ["dir:/b"]),
        "MAX_BANDWIDTH": ("1GB/s", "2GB/s"),
        "ZONE": ("a", "b"),
        "ORIGIN": ("any", "any"),
    }
    assert {*pairs, "CONFIG_FILE"} == set(FIELDS)
    inline = {name: given for name, (given, _) in pairs.items()}
    in_file = {name: given for name, (_, given) in pairs.items()}
    path = write(in_file)
    config = load_config({**inline, "CONFIG_FILE": path})
    alone = load_config(in_file)
    for name in pairs:
        assert getattr(config, name.lower()) == getattr(alone, name.lower()), name
    assert config.token == Token(f"{SECRET} 1".encode())
    assert config.config_file == path
    assert [override.field for override in config.overrides] == [name for name in FIELDS if name in pairs]


def test_an_override_names_both_values(write: Any) -> None:
    extra = {"LISTEN_PORT": 2000, "MODEL": "a", "CONFIG_FILE": write({"LISTEN_PORT": 3000, "WAIT": 5})}
    config = load_config(extra)
    assert (config.listen_port, config.model, config.wait) == (3000, "a", 5)
    (override,) = config.overrides
    assert (override.field, override.inline, override.from_file) == ("LISTEN_PORT", "2000", "3000")
    assert str(override) == "LISTEN_PORT: 3000 from CONFIG_FILE is used instead of 2000"


@pytest.mark.parametrize("empty", [[], None])
def test_source_is_replaced_whole_even_by_nothing(write: Any, empty: object) -> None:
    config = load_config({"SOURCE": [entry(0, "a:1")], "CONFIG_FILE": write({"SOURCE": empty})})
    assert config.sources_for(0) == ()
    assert len(config.overrides) == 1


def test_source_only_inline_stays(write: Any) -> None:
    config = load_config({"SOURCE": [entry(0, "a:1")], "CONFIG_FILE": write({})})
    assert config.sources_for(0) == (Address("a", 1),)
    assert config.overrides == ()


@given(inline=st.sets(st.sampled_from(sorted(FIELDS))), in_file=st.sets(st.sampled_from(sorted(FIELDS))))
def test_precedence_for_any_choice_of_fields(
    tmp_path_factory: pytest.TempPathFactory, inline: set[str], in_file: set[str]
) -> None:
    without = {"CONFIG_FILE", "TOKEN_FILE", "WAIT"}  # they need a file, or another field
    inline, in_file = inline - without, in_file - without
    values = {name: value for name, value, _ in GOOD if name not in without}  # the last good value of each
    others = {name: value for name, value, _ in reversed(GOOD) if name not in without}  # the first
    path = tmp_path_factory.mktemp("config") / "netloader.json"
    path.write_text(json.dumps({name: others[name] for name in in_file if others[name] is not HUGE}))
    config = load_config({**{name: values[name] for name in inline}, "CONFIG_FILE": str(path)})
    defaults = Config()
    for name in set(FIELDS) - without:
        expected = others if name in in_file else values
        wanted = load_config({name: expected[name]}) if name in inline | in_file else defaults
        assert getattr(config, name.lower()) == getattr(wanted, name.lower()), name
    assert {override.field for override in config.overrides} == inline & in_file


@pytest.mark.parametrize("inner", ["other.json", None, 0])
def test_a_config_file_inside_the_file_is_refused(write: Any, inner: object) -> None:
    path = write({"CONFIG_FILE": inner})
    error = error_of({"CONFIG_FILE": path})
    assert error.field == "CONFIG_FILE"
    assert "inside CONFIG_FILE is refused" in str(error)
    assert path in str(error)


def test_a_fault_in_the_file_names_the_file(write: Any) -> None:
    path = write({"WAIT": -1, "SOURCE": [entry(0, "a")], "WIAT": 1})
    error = error_of({"CONFIG_FILE": path, "FALLBACK": 0})
    assert isinstance(error, ConfigErrors)
    fields = [problem.field for problem in error.problems]
    assert fields == ["FALLBACK", "WAIT", "SOURCE[0].sources[0]", "WIAT"]
    assert [path in str(problem) for problem in error.problems] == [False, True, True, True]
    assert "did you mean WAIT?" in str(error)


def test_an_inline_value_that_the_file_overrides_is_checked_too(write: Any) -> None:
    assert error_of({"WAIT": -1, "CONFIG_FILE": write({"WAIT": 1})}).field == "WAIT"


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{\n  "WAIT": 1\n  "MODEL": "a"\n}', "line 3, column 3"),
        (b'{"WAIT": 1,}', "line 1, column 1"),
        (b'{"WAIT": 1} x', "line 1, column 13"),
        (b'{"WAIT":\n NaN}', "line 2, column 2: NaN is not JSON"),
        (b'{"MODEL": "NaN \\" NaN", "WAIT": -Infinity}', "line 1, column 33: -Infinity is not JSON"),
        (b'{"MODEL": "\n"}', "line 1, column 12"),
        (b'{"MODEL":\n "\xff"}', "line 2, column 3: not UTF-8"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"WAIT": ' + b"9" * 5000 + b"}", "digits"),
        (b"[]", "the top level is of type list"),
        (b'"SOURCE"', "the top level is of type str"),
        (b"null", "the top level is of type NoneType"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_refused_with_the_position(
    write: Any, contents: bytes, reason: str
) -> None:
    path = write(contents)
    error = error_of({"CONFIG_FILE": path})
    assert error.field == "CONFIG_FILE"
    assert path in str(error)
    assert reason in str(error)


@pytest.mark.parametrize(
    ("contents", "field"),
    [
        ('{"WAIT": 1, "WAIT": 1}', "WAIT"),
        ('{"SOURCE": [{"device_id": 0, "sources": [], "device_id": 1}]}', "SOURCE[0].device_id"),
        ('{"FALLBACK_CONFIG": {"a": [[{"b": 1, "b": 2}]]}}', "FALLBACK_CONFIG.a[0][0].b"),
    ],
)
def test_a_repeated_key_is_refused_by_its_path(write: Any, contents: str, field: str) -> None:
    path = write(contents)
    error = error_of({"CONFIG_FILE": path})
    assert error.field == field
    assert "this key repeats" in str(error)
    assert path in str(error)


def test_a_byte_order_mark_is_accepted(write: Any) -> None:
    assert load_config({"CONFIG_FILE": write('\ufeff{"WAIT": 1}')}).wait == 1


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, no_leaked_descriptors: None) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(17 << 20)
    for path, reason in [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "not a regular file"),
        (pipe, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (large, "larger than"),
        (tmp_path / ("a" * 300), "name too long"),
    ]:
        for name in ("CONFIG_FILE", "TOKEN_FILE"):
            error = error_of({name: str(path)})
            assert error.field == name
            assert reason in str(error)
            assert error.value == str(path)


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f" {SECRET}\n")
    path.chmod(0o600)
    return path


def test_the_token_is_read_and_never_shown(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config({"TOKEN_FILE": str(token_file)})
    assert config.token is not None
    assert config.token.reveal() == SECRET.encode()
    assert config.warnings == ()
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("%s %r %s %r", config, config, config.token, config.token)
    shown = [caplog.text, repr(config), str(config), f"{config.token}", repr(config.__rich_repr__()), repr([config])]
    for text in shown:
        assert SECRET not in text
        assert repr(SECRET.encode())[2:-1] not in text
    with pytest.raises(TypeError, match="unhashable"):
        hash(config.token)


def test_tokens_are_equal_by_content(token_file: Path) -> None:
    assert Token(b"a") == Token(b"a")
    assert Token(b"a") != Token(b"b")
    assert Token(b"a") != b"a"
    assert load_config({"TOKEN_FILE": str(token_file)}) == load_config({"TOKEN_FILE": str(token_file)})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602])
def test_a_token_file_that_other_users_can_read_logs_a_warning(token_file: Path, mode: int) -> None:
    token_file.chmod(mode)
    (warning,) = load_config({"TOKEN_FILE": str(token_file)}).warnings
    assert f"{mode:04o}" in warning
    assert "chmod 600" in warning
    assert SECRET not in warning


@pytest.mark.parametrize("contents", [b"", b" \n", b"fifteen bytes..", b"  fifteen bytes..  \n"])
def test_a_short_token_is_refused(token_file: Path, contents: bytes) -> None:
    token_file.write_bytes(contents)
    error = error_of({"TOKEN_FILE": str(token_file)})
    assert f"it holds {len(contents.strip())} bytes" in str(error)
    assert contents.strip() == b"" or contents.strip().decode() not in str(error)


def test_a_long_token_is_refused(token_file: Path) -> None:
    token_file.write_bytes(b"x" * 4097)
    assert "larger than 4096 bytes" in str(error_of({"TOKEN_FILE": str(token_file)}))


@pytest.mark.parametrize("key", ["TOKEN", "token_file", "SECRET", "password", "TOKEN_FIEL"])
def test_a_secret_in_the_wrong_place_is_not_shown(key: str) -> None:
    error = error_of({key: SECRET})
    assert SECRET not in str(error)
    assert "TOKEN_FILE" in error.hint


def test_settings_of_the_fallback_are_not_shown(write: Any) -> None:
    extra = {"FALLBACK_CONFIG": {"password": SECRET}, "CONFIG_FILE": write({"FALLBACK_CONFIG": {"key": SECRET}})}
    config = load_config(extra)
    assert config.fallback_config == {"key": SECRET}
    assert SECRET not in f"{config!r} {config.__rich_repr__()} {config.overrides[0]}"
    assert "1 settings" in repr(config)
    assert SECRET not in str(error_of({"FALLBACK_CONFIG": [SECRET]}))
    assert SECRET not in str(error_of({"FALLBACK_CONFIG": {"a": SECRET, "b": float("nan")}}))
