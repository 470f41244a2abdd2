"""Commands work with closed standard streams, and no file or socket gets their numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import os, sys; from netloader.cli import main; status = main(['transports']); "
CHECK = "found = os.open('/', os.O_RDONLY); os.write(int(sys.argv[1]), str((status, found > 2)).encode())"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&- <&-"])
def test_a_command_with_closed_streams_ends_as_with_open_ones(closed: str) -> None:
    reader, writer = os.pipe()
    try:
        script = f'exec "$0" -c "$1" {writer} {closed}'
        subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, SHOW + CHECK],
            check=True,
            pass_fds=[writer],
            timeout=60,
            capture_output=True,
        )
    finally:
        os.close(writer)
        said = os.read(reader, 1000)
        os.close(reader)
    assert said == b"(0, True)"
