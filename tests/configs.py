"""Helpers of the configuration tests."""

from __future__ import annotations

from typing import Any

import pytest

from netloader.config import load_config
from netloader.config.fields import SourceEntry
from netloader.core.addresses import Address
from netloader.core.urls import Url
from netloader.errors import ConfigError, shown

ROOT = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
SECRET = "correct horse battery staple"
HUGE = 10**5000  # has no text: Python refuses to print integers of that many digits


def entry(rank: int, *sources: str) -> dict[str, object]:
    return {"device_id": rank, "sources": list(sources)}


def error_of(extra: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(extra)
    return caught.value


def label(value: object) -> str:
    """Name a value in the id of a test."""
    return ascii(shown(value, 30))[1:-1]


GOOD: list[tuple[str, object, object]] = [
    ("SOURCE", None, None),
    ("SOURCE", [], ()),
    ("SOURCE", [entry(0)], (SourceEntry(0, ()),)),
    ("SOURCE", [entry(0, "a:1", "[::1]:2", "a:1")], (SourceEntry(0, (Address("a", 1), Address("::1", 2))),)),
    (
        "SOURCE",
        [entry(1, "a:1"), entry(0, "b:1")],
        (SourceEntry(1, (Address("a", 1),)), SourceEntry(0, (Address("b", 1),))),
    ),
    ("MODEL", None, None),
    ("MODEL", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ("MODEL", "模型", "模型"),
    ("LISTEN_PORT", None, None),
    ("LISTEN_PORT", 19374, 19374),
    ("LISTEN_PORT", "19374", 19374),
    ("LISTEN_PORT", "0080", 80),
    ("LISTEN_PORT", 0, 0),
    ("LISTEN_PORT", -1, -1),
    ("LISTEN_PORT", 70000, 70000),
    ("LISTEN_PORT", HUGE, HUGE),
    ("INT8_CACHE", "no", "no"),
    ("INT8_CACHE", "dram", "dram"),
    ("INT8_CACHE", "hbm", "hbm"),
    ("INT8_CACHE_NAME", None, None),
    ("INT8_CACHE_NAME", [], ()),
    ("INT8_CACHE_NAME", ["a.weight", "b", "a.weight"], ("a.weight", "b")),
    ("OUTPUT_PREFIX", None, None),
    ("OUTPUT_PREFIX", "", ""),
    ("OUTPUT_PREFIX", "/tmp/rank-", "/tmp/rank-"),
    ("CONFIG_FILE", None, None),
    ("FALLBACK", True, True),
    ("FALLBACK", False, False),
    ("FALLBACK_FORMAT", "auto", "auto"),
    ("FALLBACK_FORMAT", "Safetensors", "safetensors"),
    ("FALLBACK_CONFIG", {}, {}),
    ("FALLBACK_CONFIG", {"num_threads": 8, "deep": [{"a": None}]}, {"num_threads": 8, "deep": [{"a": None}]}),
    ("WAIT", 0, 0.0),
    ("WAIT", 1.5, 1.5),
    ("WAIT", 1199, 1199.0),
    ("TIMEOUT", 1, 1.0),
    ("TIMEOUT", 0.001, 0.001),
    ("TIMEOUT", 604800, 604800.0),
    ("STALL_TIMEOUT", 2.5, 2.5),
    ("TRANSPORT", "auto", None),
    ("TRANSPORT", ["auto"], None),
    ("TRANSPORT", "gloo", ("gloo",)),
    ("TRANSPORT", ["tcp", "gloo"], ("tcp", "gloo")),
    ("EXPECT_ROOT", None, None),
    ("EXPECT_ROOT", ROOT, ROOT),
    ("EXPECT_ROOT", ROOT.upper(), ROOT),
    ("SERVE", False, False),
    ("LISTEN_HOST", None, None),
    ("LISTEN_HOST", "0.0.0.0", "0.0.0.0"),
    ("LISTEN_HOST", "[::1]", "::1"),
    ("LISTEN_HOST", "Node-1", "node-1"),
    ("MAX_CLIENTS", 1, 1),
    ("FAN_OUT", 0, 0),
    ("FAN_OUT", 2, 2),
    ("RELAY", True, True),
    ("RELAY", False, False),
    ("RELAY_GRACE", 0, 0.0),
    ("RELAY_GRACE", 2.5, 2.5),
    ("STRIPE", 1, 1),
    ("STRIPE", 8, 8),
    ("KEEP_RAW", False, False),
    ("TOKEN_FILE", None, None),
    ("DRAFT_MODEL", None, None),
    ("DRAFT_MODEL", "org/draft", "org/draft"),
    ("DISCOVERY", None, None),
    ("DISCOVERY", [], ()),
    ("DISCOVERY", "dir:/shared/netloader", (Url("dir:/shared/netloader"),)),
    ("DISCOVERY", ["redis://u:p@h:1/0", "dns://n:1"], (Url("redis://u:p@h:1/0"), Url("dns://n:1"))),
    ("MAX_BANDWIDTH", None, None),
    ("MAX_BANDWIDTH", 1 << 20, float(1 << 20)),
    ("MAX_BANDWIDTH", "500MB/s", 500e6),
    ("MAX_BANDWIDTH", "10 Gbit/s", 1.25e9),
    ("MAX_BANDWIDTH", "1.5GiB/s", 1.5 * 2**30),
    ("ZONE", None, None),
    ("ZONE", "eu-west-1a", "eu-west-1a"),
    ("ORIGIN", "any", "any"),
]
