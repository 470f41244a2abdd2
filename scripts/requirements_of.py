"""Print the requirements of an installed distribution, except some names.

For environments in which those packages come from elsewhere.

    python scripts/requirements_of.py DISTRIBUTION [NAME ...]

Requirements of extras are omitted.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator


def requirements_of(distribution: str, leave_out: Iterable[str]) -> Iterator[str]:
    """Yield each requirement as the metadata states it, markers included.

    Args:
        distribution: An installed distribution.
        leave_out: Names of requirements to omit.
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
