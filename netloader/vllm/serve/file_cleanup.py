"""Remove a file after this process has ended, also if it was killed.

When `vllm serve` is told to end, it ends its workers with SIGKILL at once, unless it has a shutdown timeout. Then no
handler of the worker runs. So a shell process waits at a pipe, and the pipe closes when the worker ends. The shell is
not a child of the worker, because vLLM kills those too.
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

# A background process of a shell does not inherit its standard input, so the pipe gets descriptor 3.
_SCRIPT = """
exec 3<&0
(
  trap '' HUP INT TERM
  while read -r _ <&3; do :; done
  [ "$(cat -- "$1")" = "$2" ] && rm -f -- "$1"
) </dev/null &
"""


class FileCleanup:
    """Waits for the end of this process, then removes a file, unless its content has changed.

    If the shell can't be started, the file is not removed, and that is logged.

    Args:
        path: The file.
        content: What this process wrote into it.
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
            self._process.wait(_START_WITHIN)  # this shell ends at once; its background process stays
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("netloader: %s stays behind if this process is killed: %s", path, error)

    def release(self) -> None:
        """Have the file removed now."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
