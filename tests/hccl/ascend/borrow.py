"""Makes the packages of another environment importable in this one: ``borrow.py ENVIRONMENT``."""

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
    # addsitedir, because packages installed in editable form are found through a .pth file.
    line = f"import site; site.addsitedir({str(packages)!r})\n"
    Path(sysconfig.get_paths()["purelib"], "borrowed.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    main()
