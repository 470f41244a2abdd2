"""Which releases an engine consists of: vLLM's, and that of the package with its platform, if it is another one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points

__all__ = ["Release", "release_of_engine"]


@dataclass(frozen=True)
class Release:
    """The releases of an engine.

    Attributes:
        vllm: vLLM's version.
        package: The package of vLLM's platform, as it is imported; ``vllm`` for one of vLLM's own.
        distribution: The name and the version under which that package is installed; empty for ``vllm``, and where
            they are not known.
    """

    vllm: str
    package: str = "vllm"
    distribution: str = ""

    def __str__(self) -> str:
        """Both, as identities state them."""
        if self.package == "vllm":
            return f"vllm {self.vllm}"
        return f"vllm {self.vllm}, {self.distribution or f'{self.package} of unknown version'}"


def release_of_engine() -> Release:
    """The releases of this process's engine."""
    import vllm
    from vllm.platforms import current_platform

    package = _package_of(type(current_platform).__module__)
    for entry in entry_points(group="vllm.platform_plugins"):  # vLLM has found the package by one of these
        if package != "vllm" and entry.dist is not None and _package_of(entry.module) == package:
            return Release(vllm.__version__, package, f"{entry.dist.name} {entry.dist.version}")
    return Release(vllm.__version__, package)


def _package_of(module: str) -> str:
    return module.partition(".")[0]
