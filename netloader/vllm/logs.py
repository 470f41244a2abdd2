"""netloader's log lines among vLLM's."""

from __future__ import annotations

import logging

__all__ = ["join_vllm_log"]

OURS = "netloader"
THEIRS = "vllm"


class _Forward(logging.Handler):
    """Hands each record to vLLM's logger: its level, its handlers, its format, its prefix naming the process."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger(THEIRS)
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def join_vllm_log() -> None:
    """Let this library's log lines appear in vLLM's log, at vLLM's level; calling it again changes nothing.

    vLLM configures its own logger only, so that the lines of a plugin below WARNING would go nowhere. A program that
    has configured the ``netloader`` logger itself is left alone.
    """
    ours = logging.getLogger(OURS)
    if ours.handlers:
        return
    ours.addHandler(_Forward())
    ours.propagate = False
    if ours.level == logging.NOTSET:
        # vLLM sets its level later than it loads plugins, and once more in each worker; so it is looked up each time.
        ours.setLevel(logging.DEBUG)
