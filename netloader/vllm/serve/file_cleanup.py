"""Removes a file when this process has ended, however it ended.

`vllm serve` ends its workers with SIGKILL as soon as it is told to end, unless it was given a shutdown timeout; nothing
that a worker registers runs then. So a shell waits outside, holding the end of a pipe that closes with the worker. It
is no child of the worker, since vLLM kills those too.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from pathlib import Path

__all__ = ["FileCleanup"]

log = logging.getLogger(__name__)

_SHELL = "/bin/sh"
_START_WITHIN = 10.0

# Standard input of what a shell puts into the background is not the shell's own, so the pipe gets another number.
_SCRIPT = """
exec 3<&0
(
  trap '' HUP INT TERM
  while read -r _ <&3; do :; done
  [ "$(cat -- "$1")" = "$2" ] && rm -f -- "$1"
) </dev/null &
"""


class FileCleanup:
    """Waits for the end of this process, then removes a file, unless it holds something else by then.

    Where no such helper can be started, the file is not removed; that is logged.

    Args:
        path: The file.
        content: What it holds as long as it is ours.
    """

    def __init__(self, path: Path, content: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(  # noqa: S603 - a constant script; path and content are mere arguments
                [_SHELL, "-c", _SCRIPT, _SHELL, str(path.absolute()), content],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
            self._process.wait(_START_WITHIN)  # for the shell that starts the one that stays
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("netloader: %s stays behind if this process is killed: %s", path, error)

    def release(self) -> None:
        """Let the helper do its work now."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
