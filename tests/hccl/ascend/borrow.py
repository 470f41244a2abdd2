"""Lets the environment that runs this use the packages of another one: ``borrow.py ENVIRONMENT``."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    other = Path(sys.argv[1]).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = other / "lib" / version / "site-packages"
    if not packages.is_dir():
        raise SystemExit(f"{other} has no packages for {version}")
    # addsitedir, since what is installed there in editable form is known by a .pth file of its own.
    line = f"import site; site.addsitedir({str(packages)!r})\n"
    Path(sysconfig.get_paths()["purelib"], "borrowed.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    main()
