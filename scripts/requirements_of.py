"""Print what an installed distribution requires, but for some names: for environments that bring their own of those.

    python scripts/requirements_of.py DISTRIBUTION [NAME ...]

Requirements of extras are left out.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator


def requirements_of(distribution: str, leave_out: Iterable[str]) -> Iterator[str]:
    """Each requirement as its metadata has it, markers included.

    Args:
        distribution: An installed distribution.
        leave_out: Names of those that are not to be printed.
    """
    without = {_plain(name) for name in leave_out}
    for requirement in importlib.metadata.requires(distribution) or ():
        found = re.match(r"[\w.-]+", requirement)
        if found is not None and _plain(found[0]) not in without and not re.search(r"\bextra\s*==", requirement):
            yield requirement


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print("\n".join(requirements_of(sys.argv[1], sys.argv[2:])))
