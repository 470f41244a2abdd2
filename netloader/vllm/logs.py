"""Write netloader's log lines into vLLM's log."""

from __future__ import annotations

import logging
from copy import copy

from netloader.core.texts import findable

__all__ = ["join_vllm_log"]

OURS = "netloader"
THEIRS = "vllm"


class _Forward(logging.Handler):
    """Passes each record to vLLM's logger, with its level, handlers, format and process prefix.

    vLLM's format has no name of the logger. So each line begins with ``netloader: ``, by which it can be found.
    """

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger(THEIRS)
        if not theirs.isEnabledFor(record.levelno):
            return
        record = copy(record)
        record.msg, record.args = findable(record.getMessage()), None
        theirs.handle(record)


def join_vllm_log() -> None:
    """Write this library's log lines into vLLM's log, at vLLM's level. A second call changes nothing.

    vLLM configures only its own logger, so lines of a plugin below WARNING would be lost. If the program has configured
    the ``netloader`` logger itself, nothing changes.
    """
    ours = logging.getLogger(OURS)
    if ours.handlers:
        return
    ours.addHandler(_Forward())
    ours.propagate = False
    if ours.level == logging.NOTSET:
        # vLLM sets its level after it loads plugins, and again in each worker. So the handler checks it per record.
        ours.setLevel(logging.DEBUG)
