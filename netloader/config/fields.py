"""The fields of the configuration, one by one: what each may be, and how its value is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args

import msgspec

from netloader.core.addresses import ALLOWED_HOST, Address, parse_address, parse_host
from netloader.errors import ConfigError, shown

__all__ = ["FIELDS", "FORMAT_NAMES", "ConfigErrors", "Field", "Int8Cache", "SourceEntry", "key_text", "raise_all"]

Int8Cache = Literal["hbm", "dram", "no"]

FORMAT_NAMES = ("netloader", "netloader_p2p")
"""Load formats that are netloader itself; the second is the alias that no other plugin registers."""

LONGEST_WAIT = 604_800.0
"""Seconds in a week: the upper limit of every time in the configuration, far below what any clock call refuses."""

SHORTEST_TIMEOUT = 0.001
"""Seconds; less would become 0, which means "no limit" to some of the calls that are handed a timeout."""

_FORMAT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ROOT = re.compile(r"[0-9A-Fa-f]{64}")
_PLAIN_KEY = re.compile(r"[\w-]{1,100}")
_MOST_DIGITS = 20
_ENTRY = '{"device_id": 0, "sources": ["10.0.0.7:19374"]}'


class ConfigErrors(ConfigError):
    """Several fields are wrong at once; one message names them all.

    Attributes:
        problems: Every error, in the order of the configuration. The attributes of :class:`ConfigError` are those of
            the first.
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(field=first.field, value=first.value, allowed=first.allowed, reason=first.reason)
        lines = [f"{len(problems)} fields of the configuration are not valid"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        self.args = ("\n".join(lines),)
        self.problems = tuple(problems)


def raise_all(problems: Sequence[ConfigError]) -> None:
    """Raise the one problem as it is, several as :class:`ConfigErrors`, none not at all."""
    flat = [one for problem in problems for one in getattr(problem, "problems", (problem,))]
    if len(flat) == 1:
        raise flat[0]
    if flat:
        raise ConfigErrors(flat)


def key_text(key: object) -> str:
    """Return a key of an object as a message names it: as it is, or quoted where it would be misread."""
    return key if isinstance(key, str) and _PLAIN_KEY.fullmatch(key) else shown(key, 100)


class SourceEntry(msgspec.Struct, frozen=True):
    """Where one rank may pull from.

    Attributes:
        device_id: The rank.
        sources: Addresses, in the order in which they are tried; no address twice.
    """

    device_id: int
    sources: tuple[Address, ...]


class Field(msgspec.Struct, frozen=True):
    """One field of the configuration.

    Attributes:
        name: As the user writes it.
        allowed: What it may be, in words; errors quote it.
        parse: Turns the JSON value into the value that :class:`netloader.Config` holds.
        nullable: Whether ``null`` is accepted and means the same as leaving the field out.
        secret: Whether values are left out of messages, logs and ``repr``.
    """

    name: str
    allowed: str
    parse: Callable[[Field, Any], Any]
    nullable: bool = False
    secret: bool = False

    @property
    def attribute(self) -> str:
        """Name of the attribute of :class:`netloader.Config`."""
        return self.name.lower()

    def read(self, value: object) -> Any:
        """Return the value as :class:`netloader.Config` holds it.

        Raises:
            ConfigError: `value` is not allowed.
        """
        return None if value is None and self.nullable else self.parse(self, value)

    def show(self, value: object) -> str:
        """Return `value` as a log line may show it."""
        if not self.secret:
            return shown(value)
        kind = f"{len(value)} settings" if isinstance(value, Mapping) else type(value).__name__
        return f"<{kind}, not shown>"

    def reject(self, value: object, reason: str | None = None, hint: str = "") -> NoReturn:
        """Raise the error for `value`."""
        seen = _Hidden(self.show(value)) if self.secret else value
        raise ConfigError(field=self.name, value=seen, allowed=self.allowed, reason=reason, hint=hint)


class _Hidden:
    """Stands in an error for a value that must not be shown."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _fault_of_text(value: object) -> str | None:
    if not isinstance(value, str):
        return "this is not text"
    if "\0" in value:
        return "it holds a NUL character"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "it holds half of a surrogate pair"
    return None


def _text(field: Field, value: object) -> str:
    if not isinstance(value, str) or (fault := _fault_of_text(value)):
        field.reject(value, None if not isinstance(value, str) else fault)
    return value


def _filled_text(field: Field, value: object) -> str:
    text = _text(field, value)
    if not text.strip():
        field.reject(value, "it is empty")
    return text


def _boolean(field: Field, value: object) -> bool:
    if not isinstance(value, bool):
        field.reject(value)
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seconds(field: Field, value: object, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        field.reject(value)
    # Compared before the conversion: float() refuses integers of more than 308 digits.
    if (isinstance(value, float) and math.isnan(value)) or not least <= value <= LONGEST_WAIT:
        field.reject(value)
    return float(value)


def _wait(field: Field, value: object) -> float:
    return _seconds(field, value, least=0.0)


def _timeout(field: Field, value: object) -> float:
    return _seconds(field, value, least=SHORTEST_TIMEOUT)


def _source(field: Field, value: object) -> tuple[SourceEntry, ...]:
    if not isinstance(value, list | tuple):
        field.reject(value)
    problems: list[ConfigError] = []
    entries: list[SourceEntry] = []
    first_with: dict[int, int] = {}
    for index, item in enumerate(value):
        path = f"{field.name}[{index}]"
        try:
            entry = _source_entry(path, item)
        except ConfigError as error:
            problems.append(error)
            continue
        earlier = first_with.setdefault(entry.device_id, index)
        if earlier != index:
            reason = f"{field.name}[{earlier}] has this device_id already"
            problems.append(
                ConfigError(
                    field=f"{path}.device_id",
                    value=entry.device_id,
                    allowed="each device_id once",
                    reason=reason,
                    hint="list all sources of one rank in one entry",
                )
            )
        entries.append(entry)
    raise_all(problems)
    return tuple(entries)


def _source_entry(path: str, item: object) -> SourceEntry:
    keys = ("device_id", "sources")
    allowed = f"an object like {_ENTRY}"
    if not isinstance(item, Mapping):
        raise ConfigError(field=path, value=item, allowed=allowed)
    problems = [
        ConfigError(field=f"{path}.{key_text(key)}", value=item[key], allowed=", ".join(keys), reason="unknown key")
        for key in item
        if key not in keys
    ]
    problems += [
        ConfigError(field=path, value=item, allowed=allowed, reason=f"the key {key!r} is missing")
        for key in keys
        if key not in item
    ]
    device_id = item.get("device_id", 0)
    if not _is_integer(device_id) or device_id < 0:
        rank = "the number of a rank, an integer from 0"
        problems.append(ConfigError(field=f"{path}.device_id", value=device_id, allowed=rank))
    sources = item.get("sources", [])
    addresses: list[Address] = []
    if isinstance(sources, list | tuple):
        for index, source in enumerate(sources):
            try:
                addresses.append(parse_address(source, field=f"{path}.sources[{index}]"))
            except ConfigError as error:
                problems.append(error)
    else:
        problems.append(ConfigError(field=f"{path}.sources", value=sources, allowed="a list of addresses"))
    raise_all(problems)
    return SourceEntry(device_id, tuple(dict.fromkeys(addresses)))


def _listen_port(field: Field, value: object) -> int:
    if isinstance(value, str):
        # isdigit() alone takes superscripts, and int() refuses some thousand digits with an error of its own.
        if not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
            field.reject(value)
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        field.reject(value)
    return value


def _count(field: Field, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        field.reject(value)
    return value


def _from_one(field: Field, value: object) -> int:
    return _count(field, value, least=1)


def _from_zero(field: Field, value: object) -> int:
    return _count(field, value, least=0)


def _int8_cache(field: Field, value: object) -> str:
    choices = get_args(Int8Cache)
    if not isinstance(value, str) or value not in choices:
        hint = f"write {value.lower()!r}" if isinstance(value, str) and value.lower() in choices else ""
        field.reject(value, hint=hint)
    return value


def _names(field: Field, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        field.reject(value)
    problems = [
        ConfigError(field=f"{field.name}[{index}]", value=name, allowed="the name of a parameter")
        for index, name in enumerate(value)
        if not name or _fault_of_text(name)
    ]
    raise_all(problems)
    return tuple(dict.fromkeys(value))


def _fallback_format(field: Field, value: object) -> str:
    if not isinstance(value, str) or not _FORMAT_NAME.fullmatch(value):
        field.reject(value)
    name = value.lower()  # as vLLM does with --load-format
    if name in FORMAT_NAMES:
        field.reject(value, "netloader cannot fall back to itself", "write auto, or the format of the files")
    return name


def _fallback_config(field: Field, value: object) -> dict[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        field.reject(value)
    try:
        copy: dict[str, object] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        field.reject(value, "it holds something that JSON cannot")
    return copy


def _transport(field: Field, value: object) -> tuple[str, ...] | None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        field.reject(value)
    if not all(isinstance(name, str) and _FORMAT_NAME.fullmatch(name) for name in names):
        field.reject(value)
    if len(set(names)) < len(names):
        field.reject(value, "a name stands twice")
    if "auto" in names:
        if len(names) > 1:
            field.reject(value, "auto stands alone")
        return None
    return tuple(names)


def _expect_root(field: Field, value: object) -> str:
    if not isinstance(value, str) or not _ROOT.fullmatch(value):
        field.reject(value, hint="a server logs its root when it starts to serve")
    return value.lower()


def _listen_host(field: Field, value: object) -> str:
    return parse_host(value, field=field.name)


_TRUE_FALSE = "true or false"
_TIMES = f"seconds, a number from {SHORTEST_TIMEOUT:g} to {LONGEST_WAIT:.0f}"
_INTEGER = "an integer, or one written as a string of digits; LISTEN_PORT + rank within 1024-65535 opens a listener"

_ALL = (
    Field("SOURCE", f"a list of objects like {_ENTRY}", _source, nullable=True),
    Field("MODEL", "a name, not empty", _filled_text, nullable=True),
    Field("LISTEN_PORT", _INTEGER, _listen_port, nullable=True),
    Field("INT8_CACHE", "one of 'hbm', 'dram', 'no'", _int8_cache),
    Field("INT8_CACHE_NAME", "a list of names of parameters, or null", _names, nullable=True),
    Field("OUTPUT_PREFIX", "the beginning of a path, as text", _text, nullable=True),
    Field("CONFIG_FILE", "the path of a JSON file", _filled_text, nullable=True),
    Field("FALLBACK", _TRUE_FALSE, _boolean),
    Field("FALLBACK_FORMAT", "a load format of vLLM other than netloader", _fallback_format),
    Field("FALLBACK_CONFIG", "an object of settings for that load format", _fallback_config, secret=True),
    Field("WAIT", f"seconds, a number from 0 to {LONGEST_WAIT:.0f}", _wait),
    Field("TIMEOUT", _TIMES, _timeout),
    Field("STALL_TIMEOUT", _TIMES, _timeout),
    Field("TRANSPORT", "'auto', the name of a transport, or a list of such names", _transport),
    Field("EXPECT_ROOT", "a root in 64 hexadecimal digits", _expect_root, nullable=True),
    Field("SERVE", _TRUE_FALSE, _boolean),
    Field("LISTEN_HOST", ALLOWED_HOST, _listen_host, nullable=True),
    Field("MAX_CLIENTS", "an integer from 1", _from_one),
    Field("FAN_OUT", "an integer from 0", _from_zero),
    Field("RELAY", _TRUE_FALSE, _boolean),
    Field("RELAY_GRACE", f"seconds, a number from 0 to {LONGEST_WAIT:.0f}", _wait),
    Field("STRIPE", "an integer from 1", _from_one),
    Field("KEEP_RAW", _TRUE_FALSE, _boolean),
    Field("TOKEN_FILE", "the path of a file that holds the shared secret", _filled_text, nullable=True),
)

FIELDS: Mapping[str, Field] = MappingProxyType({field.name: field for field in _ALL})
"""Every field by its name, in the order of docs/configuration.md."""
