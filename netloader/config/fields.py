"""The fields of the configuration: the allowed values of each, and how its value is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn, get_args

import msgspec
from msgspec import Meta

from netloader.core.addresses import ALLOWED_HOST, Address, parse_address, parse_host
from netloader.core.identity import MAX_MODEL
from netloader.core.rates import ALLOWED_RATE, parse_rate
from netloader.core.urls import Url, without_secrets
from netloader.errors import ConfigError, shown

__all__ = [
    "FIELDS",
    "FORMAT_NAMES",
    "ConfigErrors",
    "Faults",
    "Field",
    "Int8Cache",
    "Origin",
    "SourceEntry",
    "key_text",
]

Int8Cache = Literal["hbm", "dram", "no"]
Origin = Literal["any", "lease"]

FORMAT_NAMES = ("netloader", "netloader_p2p")
"""Load formats that are netloader itself. The second is an alias that no other plugin registers."""

LONGEST_WAIT = 604_800.0
"""Seconds of a week: the upper limit of every time in the configuration, far below the limits of all clock calls."""

SHORTEST_TIMEOUT = 0.001
"""Seconds. A smaller timeout would be rounded to 0, which some calls take as "no limit"."""

_FORMAT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ROOT = re.compile(r"[0-9A-Fa-f]{64}")
_ZONE = re.compile(r"[A-Za-z0-9][\w./:-]{0,63}", re.ASCII)
ALLOWED_ZONE = "the name of a zone: at most 64 letters, digits and -_./:, beginning with a letter or digit"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:\S+")
_PLAIN_KEY = re.compile(r"[\w-]{1,100}")
_MOST_DIGITS = 20
_ENTRY = '{"device_id": 0, "sources": ["10.0.0.7:19374"]}'


class ConfigErrors(ConfigError):
    """Several fields are not valid; one message names them all.

    Attributes:
        problems: Every error, in the order of the configuration. The attributes of :class:`ConfigError` are taken from
            the first.
    """

    def __init__(self, problems: Sequence[ConfigError], what: str = "fields of the configuration") -> None:
        first = problems[0]
        super().__init__(field=first.field, value=first.value, allowed=first.allowed, reason=first.reason)
        lines = [f"{len(problems)} {what} are not valid"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        self.args = ("\n".join(lines),)
        self.problems = tuple(problems)


class Faults:
    """Collects the errors of several values. Each value is read in a ``with`` block of its own, which its error ends.

    Args:
        what: What the values are, for the message.

    Attributes:
        found: The errors, in order.
    """

    def __init__(self, what: str = "fields of the configuration") -> None:
        self._what = what
        self.found: list[ConfigError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, ConfigError):
            return False
        self.found += error.problems if isinstance(error, ConfigErrors) else [error]
        return True

    def raise_all(self) -> None:
        """Raise a single error as it is, and several errors as :class:`ConfigErrors`."""
        if len(self.found) > 1:
            raise ConfigErrors(self.found, self._what)
        if self.found:
            raise self.found[0]


def is_root(value: object) -> bool:
    """Whether `value` is a root as text."""
    return isinstance(value, str) and _ROOT.fullmatch(value) is not None


def is_zone(value: object) -> bool:
    """Whether `value` names a zone."""
    return isinstance(value, str) and _ZONE.fullmatch(value) is not None


def key_text(key: object) -> str:
    """Return the text of a key for messages: as it is if it is plain, otherwise quoted."""
    return key if isinstance(key, str) and _PLAIN_KEY.fullmatch(key) else shown(key, 100)


class SourceEntry(msgspec.Struct, frozen=True):
    """The sources of one rank.

    Attributes:
        device_id: The rank.
        sources: Addresses, in the order in which they are tried; no address twice.
    """

    device_id: int
    sources: tuple[Address, ...]


class Field(msgspec.Struct, frozen=True):
    """One field of the configuration.

    Attributes:
        name: Name, as the user writes it.
        allowed: The allowed values, in words; errors quote it.
        given: Type and bounds of the JSON value, for msgspec. It includes None where ``null`` means the default.
        parse: Converts a value of that type to that of :class:`netloader.Config`; None if the two are the same.
        secret: Whether messages, logs and ``repr`` hide the value.
        hide: Makes of a value what is shown of it, where a part of it is secret.
    """

    name: str
    allowed: str
    given: Any
    parse: Callable[[Field, Any], Any] | None = None
    secret: bool = False
    hide: Callable[[Any], object] | None = None

    @property
    def attribute(self) -> str:
        """Name of its attribute in :class:`netloader.Config`."""
        return self.name.lower()

    def read(self, value: object) -> Any:
        """Return the value as :class:`netloader.Config` holds it.

        Raises:
            ConfigError: `value` is not allowed.
        """
        if isinstance(value, set | frozenset):  # msgspec would accept it as a list, in arbitrary order
            self.reject(value)
        try:
            found = msgspec.convert(value, self.given)
        except (msgspec.ValidationError, RecursionError):
            self.reject(value)  # `allowed` says more than msgspec's message
        return found if found is None or self.parse is None else self.parse(self, found)

    def show(self, value: object) -> str:
        """Return the text of `value` for a log line."""
        if not self.secret:
            return shown(value if self.hide is None else self.hide(value))
        kind = f"{len(value)} settings" if isinstance(value, Mapping) else type(value).__name__
        return f"<{kind}, not shown>"

    def reject(self, value: object, reason: str | None = None, hint: str = "") -> NoReturn:
        """Raise the error for `value`."""
        seen = Hidden(self.show(value)) if self.secret or self.hide is not None else value
        raise ConfigError(field=self.name, value=seen, allowed=self.allowed, reason=reason, hint=hint)


class Hidden:
    """Replaces a secret value in an error."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _fault_of_text(text: str) -> str | None:
    if "\0" in text:
        return "it holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair"
    return None


def _text(field: Field, value: str) -> str:
    fault = _fault_of_text(value)
    if fault:
        field.reject(value, fault)
    return value


def _filled_text(field: Field, value: str) -> str:
    text = _text(field, value)
    if not text.strip():
        field.reject(value, "it is empty")
    return text


def _model_name(field: Field, value: str) -> str:
    text = _filled_text(field, value)
    if len(text) > MAX_MODEL:
        field.reject(value, f"it has {len(text)} characters")
    return text


def _each(read: Callable[[str, Any], Any], field: Field, values: list[object]) -> tuple[Any, ...]:
    """Read the items of a list, each under a name of its own. Duplicates are dropped."""
    faults, found = Faults(), list[Any]()
    for index, value in enumerate(values):
        with faults:
            found.append(read(f"{field.name}[{index}]", value))
    faults.raise_all()
    return tuple(dict.fromkeys(found))


def _sources(field: Field, values: list[object]) -> tuple[SourceEntry, ...]:
    first_with: dict[int, str] = {}

    def read(path: str, value: object) -> SourceEntry:
        entry: SourceEntry = Field(path, f"an object like {_ENTRY}", dict, _source_entry).read(value)
        earlier = first_with.setdefault(entry.device_id, path)
        if earlier != path:
            raise ConfigError(
                field=f"{path}.device_id",
                value=entry.device_id,
                allowed="each device_id once",
                reason=f"{earlier} has this device_id already",
                hint="list all sources of one rank in one entry",
            )
        return entry

    return _each(read, field, values)


def _source_entry(field: Field, given: dict[object, object]) -> SourceEntry:
    fields: dict[object, Field] = {
        "device_id": Field(f"{field.name}.device_id", "the number of a rank, an integer from 0", _FromZero),
        "sources": Field(f"{field.name}.sources", "a list of addresses", list, _addresses),
    }
    faults, values = Faults(), dict[object, Any]()
    for key, value in given.items():
        with faults:
            if key not in fields:
                name, allowed = f"{field.name}.{key_text(key)}", ", ".join(map(str, fields))
                raise ConfigError(field=name, value=value, allowed=allowed, reason="unknown key")
            values[key] = fields[key].read(value)
    for key in fields:
        with faults:
            if key not in given:
                field.reject(given, f"the key {key!r} is missing")
    faults.raise_all()
    return SourceEntry(values["device_id"], values["sources"])


def _addresses(field: Field, values: list[object]) -> tuple[Address, ...]:
    return _each(lambda path, value: parse_address(value, field=path), field, values)


def _listen_port(field: Field, value: int | str) -> int:
    # isdigit() alone accepts superscripts. int() raises ValueError for thousands of digits.
    if isinstance(value, str) and not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
        field.reject(value)
    return int(value)


def _int8_cache(field: Field, value: str) -> str:
    choices = get_args(Int8Cache)
    if value not in choices:
        field.reject(value, hint=f"write {value.lower()!r}" if value.lower() in choices else "")
    return value


def _names(field: Field, values: list[object]) -> tuple[str, ...]:
    return _each(
        lambda path, value: Field(path, "the name of a parameter", _NotEmpty, _text).read(value), field, values
    )


def _fallback_format(field: Field, value: str) -> str:
    if not _FORMAT_NAME.fullmatch(value):
        field.reject(value)
    name = value.lower()  # as vLLM does with --load-format
    if name in FORMAT_NAMES:
        field.reject(value, "netloader cannot fall back to itself", "write auto, or the format of the files")
    return name


def _fallback_config(field: Field, value: dict[str, object]) -> dict[str, object]:
    try:
        copy: dict[str, object] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        field.reject(value, "it holds something that JSON cannot")
    return copy


def _transport(field: Field, value: str | list[str]) -> tuple[str, ...] | None:
    names = [value] if isinstance(value, str) else value
    if not names or not all(_FORMAT_NAME.fullmatch(name) for name in names):
        field.reject(value)
    if len(set(names)) < len(names):
        field.reject(value, "a name stands twice")
    if "auto" in names:
        if len(names) > 1:
            field.reject(value, "auto stands alone")
        return None
    return tuple(names)


def _expect_root(field: Field, value: object) -> str:
    if not isinstance(value, str) or not is_root(value):
        field.reject(value, hint="a server logs its root when it starts to serve")
    return value.lower()


def _listen_host(field: Field, value: object) -> str:
    return parse_host(value, field=field.name)


def _discovery(field: Field, value: str | list[str]) -> tuple[Url, ...]:
    urls = [value] if isinstance(value, str) else value
    for url in urls:
        fault = _fault_of_text(url)
        if fault or not _URL.fullmatch(url):
            field.reject(
                value, fault or "it is no URL: each begins with a scheme and a colon, and holds no white space"
            )
    if len(set(urls)) < len(urls):
        field.reject(value, "a URL stands twice")
    return tuple(map(Url, urls))


def _shown_urls(value: object) -> object:
    """A value of DISCOVERY as it may be shown."""
    if isinstance(value, str):
        return without_secrets(value)
    return [_shown_urls(one) for one in value] if isinstance(value, list | tuple) else value


def _zone(field: Field, value: str) -> str:
    if not is_zone(value):
        field.reject(value)
    return value


def _rate(field: Field, value: float | str) -> float:
    rate = parse_rate(value)
    if rate is None:
        field.reject(value)
    return rate


def _origin(field: Field, value: str) -> str:
    choices = get_args(Origin)
    if value not in choices:
        field.reject(value, hint=f"write {value.lower()!r}" if value.lower() in choices else "")
    return value


_FromZero = Annotated[int, Meta(ge=0)]
_FromOne = Annotated[int, Meta(ge=1)]
_NotEmpty = Annotated[str, Meta(min_length=1)]
_Wait = Annotated[float, Meta(ge=0, le=LONGEST_WAIT)]
_Timeout = Annotated[float, Meta(ge=SHORTEST_TIMEOUT, le=LONGEST_WAIT)]

_DISCOVERIES = "the URL of a registry, like 'dir:/shared/netloader', or a list of such URLs"
_NAME = f"a name of at most {MAX_MODEL} characters, not empty"
_TRUE_FALSE = "true or false"
_WAITS = f"seconds, a number from 0 to {LONGEST_WAIT:.0f}"
_TIMES = f"seconds, a number from {SHORTEST_TIMEOUT:g} to {LONGEST_WAIT:.0f}"
_INTEGER = "an integer, or one written as a string of digits; LISTEN_PORT + rank within 1024-65535 opens a listener"

_ALL = (
    Field("SOURCE", f"a list of objects like {_ENTRY}", list | None, _sources),
    Field("MODEL", _NAME, str | None, _model_name),
    Field("LISTEN_PORT", _INTEGER, int | str | None, _listen_port),
    Field("INT8_CACHE", "one of 'hbm', 'dram', 'no'", str, _int8_cache),
    Field("INT8_CACHE_NAME", "a list of names of parameters, or null", list | None, _names),
    Field("OUTPUT_PREFIX", "the beginning of a path, as text", str | None, _text),
    Field("CONFIG_FILE", "the path of a JSON file", str | None, _filled_text),
    Field("FALLBACK", _TRUE_FALSE, bool),
    Field("FALLBACK_FORMAT", "a load format of vLLM other than netloader", str, _fallback_format),
    Field(
        "FALLBACK_CONFIG", "an object of settings for that load format", dict[str, Any], _fallback_config, secret=True
    ),
    Field("WAIT", _WAITS, _Wait),
    Field("TIMEOUT", _TIMES, _Timeout),
    Field("STALL_TIMEOUT", _TIMES, _Timeout),
    Field("TRANSPORT", "'auto', the name of a transport, or a list of such names", str | list[str], _transport),
    Field("EXPECT_ROOT", "a root in 64 hexadecimal digits", Any, _expect_root),
    Field("SERVE", _TRUE_FALSE, bool),
    Field("LISTEN_HOST", ALLOWED_HOST, Any, _listen_host),
    Field("MAX_CLIENTS", "an integer from 1", _FromOne),
    Field("FAN_OUT", "an integer from 0", _FromZero),
    Field("RELAY", _TRUE_FALSE, bool),
    Field("RELAY_GRACE", _WAITS, _Wait),
    Field("STRIPE", "an integer from 1", _FromOne),
    Field("KEEP_RAW", _TRUE_FALSE, bool),
    Field("TOKEN_FILE", "the path of a file that holds the shared secret", str | None, _filled_text),
    Field("DRAFT_MODEL", _NAME, str | None, _model_name),
    Field("DISCOVERY", _DISCOVERIES, str | list[str] | None, _discovery, hide=_shown_urls),
    Field("ZONE", ALLOWED_ZONE, str | None, _zone),
    Field("ORIGIN", "one of 'any', 'lease'", str, _origin),
    Field("MAX_BANDWIDTH", ALLOWED_RATE, int | float | str | None, _rate),
)

FIELDS: Mapping[str, Field] = MappingProxyType({field.name: field for field in _ALL})
"""Every field by its name, in the order of docs/configuration.md."""
