"""Names of models that follow from where their files are."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["repo_id_of"]

_FOLDER = re.compile(r"models--(?!-)(?P<owner>.+?)--(?P<name>.+)|models--(?P<only>.+)", re.DOTALL)


def repo_id_of(path: Path | str) -> str:
    """The repository id of a folder or file in a Hugging Face cache.

    The cache keeps a model as ``models--ORG--NAME/snapshots/COMMIT``. The path of such a folder differs between hosts;
    the id does not. The path is not opened, and symbolic links are not followed: a file of a snapshot is a link out of
    it.

    Args:
        path: For example ``/cache/models--org--name/snapshots/0123abc``, with or without what lies below.

    Returns:
        ``org/name``, or ``name`` for one of the old models without an organisation. Empty when `path` is not in a
        snapshot.
    """
    parts = Path(path).parts
    # The innermost snapshot counts: a cache may lie inside anything.
    for at in range(len(parts) - 3, -1, -1):
        if parts[at + 1] == "snapshots" and (found := _FOLDER.fullmatch(parts[at])):
            return found["only"] or f"{found['owner']}/{found['name']}"
    return ""
