"""Values of a configuration in the types of JSON, the same in every process for equal values."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["NotComparable", "contents_of", "digest_of_plain", "hidden_text", "plain", "short_text"]

_DEPTH = 16

_SHORT = 64
"""Most characters of a value that is stated as it is; of a longer one, a digest is stated."""

_ROUNDS = 50_000
"""Rounds of the digest of a value that may be a secret: about 20 ms on one core for each guess at a short one."""


class NotComparable(Exception):
    """A value whose contents can't be compared. The text names its class."""


def digest_of_plain(value: Any) -> str:
    """A digest over a value that :func:`plain` returned."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def plain(value: Any, depth: int = 0, *, strict: bool = False) -> Any:
    """`value` in the types of JSON, without addresses, with sets sorted.

    Args:
        value: The value.
        depth: The number of values that contain it.
        strict: Raise for a value that can't be compared. Else the name of its class is used.

    Raises:
        NotComparable: `strict`, and a value can't be compared.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    if depth > _DEPTH:
        return _not_comparable(value, strict=strict)
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1, strict=strict) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1, strict=strict) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, depth + 1, strict=strict) for item in value), key=json.dumps)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, torch.dtype):
        return str(value)
    return _not_comparable(value, strict=strict)


def contents_of(file: Path) -> Any:
    """The contents of a JSON file. A digest if the file is not JSON; None if it can't be read, which vLLM reports."""
    try:
        data = file.read_bytes()
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return None
    try:
        return json.loads(data)
    except ValueError:
        return hashlib.blake2b(data, digest_size=16).hexdigest()


def short_text(value: Any) -> str:
    """A value in the types of JSON as text, if that has at most 64 characters; else a digest of it."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= _SHORT:
        return text
    return f"blake2b:{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=16).hexdigest()}"


def hidden_text(path: str, value: Any) -> str:
    """A digest of a value in the types of JSON, in words, for one that may be a secret.

    Args:
        path: The path of the setting. Equal values at two paths have other digests.
        value: The value.
    """
    text = json.dumps(value, sort_keys=True)
    digest = hashlib.pbkdf2_hmac("sha256", text.encode(), path.encode(), _ROUNDS, 16)
    return f"a value that is not shown (digest {digest.hex()})"


def _not_comparable(value: Any, *, strict: bool) -> str:
    if strict:
        raise NotComparable(type(value).__qualname__)
    return type(value).__qualname__
