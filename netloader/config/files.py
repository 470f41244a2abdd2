"""The two files that a configuration may name: ``CONFIG_FILE`` and ``TOKEN_FILE``."""

from __future__ import annotations

import hmac
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import NoReturn

from netloader.config.fields import Faults, key_text
from netloader.errors import ConfigError, shown

__all__ = ["Token", "from_file", "read_config_file", "read_token"]

_MOST_CONFIG_BYTES = 16 << 20
MOST_TOKEN_BYTES = 4096
LEAST_TOKEN_BYTES = 16

# Matches a string as a whole, so that a NaN inside it is not mistaken for the constant.
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<constant>NaN|-?Infinity)', re.DOTALL)


class Token:
    """A shared secret. Neither ``repr`` nor ``str`` shows it; only :meth:`reveal` does."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def reveal(self) -> bytes:
        """The secret itself."""
        return self._secret

    def __repr__(self) -> str:
        return "<token>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]  # a key made from a secret ends up in places it should not


def from_file(error: ConfigError, path: str) -> ConfigError:
    """Return `error` with the name of the file that contains the value."""
    where = f"in CONFIG_FILE {shown(path)}"
    reason = f"{error.reason}; {where}" if error.reason else where
    return ConfigError(field=error.field, value=error.value, allowed=error.allowed, reason=reason, hint=error.hint)


class _Object(dict[str, object]):
    """A JSON object of the file, with the keys that occur in it more than once."""

    repeated: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: list[tuple[str, object]]) -> _Object:
        made = cls(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            made.repeated = tuple(key for key in made if keys.count(key) > 1)
        return made


def read_config_file(path: str) -> Mapping[str, object]:
    """Read ``CONFIG_FILE``: one JSON object, no key twice at any depth.

    Returns:
        The fields as the file gives them, not checked.

    Raises:
        ConfigError: The file cannot be read, or is not such JSON. The message names line and column if they are known.
    """

    def wrong(reason: str, hint: str = "") -> ConfigError:
        return ConfigError(field="CONFIG_FILE", value=path, allowed="a JSON file", reason=reason, hint=hint)

    try:
        data, _ = _read_file(path, _MOST_CONFIG_BYTES)
    except OSError as error:
        raise wrong(f"it cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        line = before.count(b"\n") + 1
        raise wrong(f"line {line}, column {column}: not UTF-8") from error

    def constant(name: str) -> NoReturn:
        # The parser stops at the first constant, so the first one outside a string is the right one.
        start = next((m.start() for m in _CONSTANT.finditer(text) if m["constant"]), 0)
        raise wrong(f"line {_line(text, start)}, column {_column(text, start)}: {name} is not JSON")

    try:
        parsed = json.loads(text, object_pairs_hook=_Object.of, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise wrong(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise wrong("it is nested too deep") from error
    except ValueError as error:  # an integer of thousands of digits
        raise wrong(str(error)) from error
    if not isinstance(parsed, _Object):
        raise wrong(f"the top level is of type {type(parsed).__name__}", "put the fields into one object: {...}")
    faults = Faults()
    faults.found += [
        from_file(ConfigError(field=where, value=value, allowed="each key once", reason="this key repeats"), path)
        for where, value in _repeated_keys(parsed)
    ]
    faults.raise_all()
    return parsed


def _repeated_keys(top: _Object) -> Iterator[tuple[str, object]]:
    """Yield each repeated key by its path, with its last value. Not recursive, because the user decides the depth."""
    waiting: list[tuple[str, object]] = [("", top)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _Object):
            yield from ((f"{path}{key_text(key)}", value[key]) for key in value.repeated)
            waiting += [(f"{path}{key_text(key)}.", below) for key, below in reversed(value.items())]
        elif isinstance(value, list):
            bare = path.removesuffix(".")
            waiting += [(f"{bare}[{n}].", below) for n, below in reversed(list(enumerate(value)))]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _column(text: str, position: int) -> int:
    return position - text.rfind("\n", 0, position)


def read_token(path: str, warnings: list[str]) -> Token:
    """Read ``TOKEN_FILE``: its bytes without leading and trailing white space.

    Args:
        path: The file.
        warnings: A line is appended if other users of the host have access to the file.

    Raises:
        ConfigError: The file cannot be read, or the secret is too short or too long.
    """

    def wrong(reason: str, hint: str = "") -> ConfigError:
        allowed = f"a file with a secret of {LEAST_TOKEN_BYTES} to {MOST_TOKEN_BYTES} bytes"
        return ConfigError(field="TOKEN_FILE", value=path, allowed=allowed, reason=reason, hint=hint)

    try:
        data, mode = _read_file(path, MOST_TOKEN_BYTES)
    except OSError as error:
        raise wrong(f"it cannot be read: {error.strerror or error}") from error
    secret = data.strip()
    if len(secret) < LEAST_TOKEN_BYTES:
        raise wrong(f"it holds {len(secret)} bytes", "make one with: openssl rand -hex 32")
    if mode & 0o077:
        # Only a warning: secrets mounted into a container are often readable by all, and the container has one user.
        warnings.append(
            f"TOKEN_FILE {shown(path)} has mode {mode & 0o777:04o}: others on this machine can get at the secret "
            f"(chmod 600)"
        )
    return Token(secret)


def _read_file(path: str, most: int) -> tuple[bytes, int]:
    """Read a small regular file.

    Returns:
        Its contents and its mode.

    Raises:
        OSError: It cannot be read, is larger than `most` bytes, or is no regular file.
    """
    # O_NONBLOCK: otherwise, opening a named pipe would wait for a writer without a limit.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(None, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise OSError(None, f"larger than {most} bytes")
    return data, mode
