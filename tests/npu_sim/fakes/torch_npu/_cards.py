"""Which cards of the host a process sees, as its devices ``npu:0``, ``npu:1`` and so on."""

from __future__ import annotations

import os

from ._memory import DEVICES

VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
"""CANN's own: numbers of cards, separated by commas, in the order of the process's devices."""


def visible() -> tuple[int, ...]:
    """The cards behind the devices of this process.

    Raises:
        RuntimeError: More cards are named than this process can have devices.
    """
    text = os.environ.get(VARIABLE, "")
    cards = tuple(int(part) for part in text.split(",")) if text else tuple(range(DEVICES))
    if len(cards) > DEVICES:
        raise RuntimeError(f"{VARIABLE} names {len(cards)} cards, at most {DEVICES} are simulated")
    return cards
