"""Checks the arguments of calls of the library. All that are wrong are reported together, in the caller's words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real

from netloader.config.fields import Faults, Hidden, is_root
from netloader.config.files import LEAST_TOKEN_BYTES, MOST_TOKEN_BYTES
from netloader.core.addresses import parse_host
from netloader.core.rates import ALLOWED_RATE, parse_rate
from netloader.errors import ConfigError

__all__ = ["Arguments"]

_HIGHEST_PORT = 65535


class Arguments:
    """The arguments of one call.

    Each method checks one argument, whose name is its first parameter, and keeps the error. :meth:`raise_all` raises
    them.
    """

    def __init__(self) -> None:
        self._faults = Faults("arguments")

    def reading(self) -> Faults:
        """A ``with`` block that keeps the :class:`~netloader.ConfigError` of what it holds."""
        return self._faults

    def raise_all(self) -> None:
        """Raise what was found.

        Raises:
            ConfigError: One or more arguments are not valid; the message names all of them.
        """
        self._faults.raise_all()

    def seconds(self, name: str, value: object, *, positive: bool = False, none: bool = False) -> None:
        """A time. `positive`: 0 is not allowed. `none`: None is allowed."""
        if none and value is None:
            return
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        if not (number > 0 if positive else number >= 0):  # as a NaN is not
            least = "above 0" if positive else "from 0"
            self._wrong(name, value, f"seconds, a number {least}" + (", or None" if none else ""))

    def integer(self, name: str, value: object, *, least: int, most: int | None = None) -> None:
        """An integer within bounds."""
        fine = isinstance(value, Integral) and not isinstance(value, bool)
        if not fine or value < least or (most is not None and value > most):  # type: ignore[operator]
            self._wrong(name, value, f"an integer from {least}" + ("" if most is None else f" to {most}"))

    def rate(self, name: str, value: object) -> float | None:
        """Bytes per second as a number or as text, or None. Returns the number."""
        fine = isinstance(value, Real | str) and not isinstance(value, bool)
        rate = parse_rate(value) if fine else None  # type: ignore[arg-type]
        if rate is None and value is not None:
            self._wrong(name, value, ALLOWED_RATE)
        return rate

    def port(self, name: str, value: object) -> None:
        """A port to bind."""
        self.integer(name, value, least=0, most=_HIGHEST_PORT)

    def host(self, name: str, value: object) -> None:
        """A host to bind, or None."""
        if value is not None:
            with self._faults:
                parse_host(value, field=name)

    def token(self, name: str, value: object) -> None:
        """A shared secret, or None. The error does not show it."""
        allowed = f"bytes, {LEAST_TOKEN_BYTES} to {MOST_TOKEN_BYTES} of them, or None"
        if isinstance(value, str):
            self._wrong(name, Hidden("<text, not shown>"), allowed, "it is text", "encode it: token.encode()")
        elif value is not None and not isinstance(value, bytes):
            self._wrong(name, Hidden(f"<{type(value).__name__}, not shown>"), allowed)
        elif value is not None and not LEAST_TOKEN_BYTES <= len(value) <= MOST_TOKEN_BYTES:
            hint = "make one with: openssl rand -hex 32"
            self._wrong(name, Hidden(f"<{len(value)} bytes, not shown>"), allowed, hint=hint)

    def root(self, name: str, value: object) -> None:
        """A root in hex, or nothing."""
        if value is not None and value != "" and not is_root(value):
            hint = "a server logs its root when it starts to serve"
            self._wrong(name, value, "a root in 64 hexadecimal digits, or None", hint=hint)

    def kind(self, name: str, value: object, kinds: type | tuple[type, ...], allowed: str, hint: str = "") -> None:
        """An instance of one of these classes."""
        if not isinstance(value, kinds):
            self._wrong(name, value, allowed, f"it is of type {type(value).__name__}", hint)

    def function(self, name: str, value: object) -> None:
        """A function, or None."""
        if value is not None and not callable(value):
            self._wrong(name, value, "a function, or None")

    def functions(self, name: str, values: object) -> None:
        """Several functions."""
        if not isinstance(values, Iterable) or not all(map(callable, values)):
            self._wrong(name, values, "a list of functions")

    def choice(self, name: str, value: object, choices: Collection[str]) -> None:
        """One of a few words."""
        if not isinstance(value, str) or value not in choices:
            self._wrong(name, value, f"one of {', '.join(map(repr, choices))}")

    def choices(self, name: str, values: object, choices: Collection[str]) -> None:
        """At least one of a few words."""
        fine = isinstance(values, Iterable) and not isinstance(values, str)
        found = list(values) if fine else []  # type: ignore[call-overload]
        if not found or not all(isinstance(value, str) and value in choices for value in found):
            self._wrong(name, values, f"a list of some of {', '.join(map(repr, choices))}")

    def _wrong(self, name: str, value: object, allowed: str, reason: str | None = None, hint: str = "") -> None:
        self._faults.found.append(ConfigError(field=name, value=value, allowed=allowed, reason=reason, hint=hint))
