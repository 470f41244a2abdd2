"""The built wheel, installed with its declared dependencies only: no torch, no vLLM, no accelerator package."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import netloader
from netloader.errors import TORCH_HINT

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torch_npu", "vllm", "numpy", "safetensors", "transformers")

ENTRY_POINTS = {
    "console_scripts": {"netloader": "netloader.cli:main"},
    "vllm.general_plugins": {"netloader": "netloader.vllm.plugin:register"},
    "netloader.transports": {
        "memory": "netloader.transports.memory:MemoryTransport",
        "gloo": "netloader.transports.gloo:GlooTransport",
        "hccl": "netloader.transports.hccl:HcclTransport",
        "shm": "netloader.transports.shm:ShmTransport",
        "tcp": "netloader.transports.tcp:TcpTransport",
    },
    "netloader.discovery": {
        "dir": "netloader.discovery.folder:open_folder",
        "dns": "netloader.discovery.dns_records:open_dns",
        "dns+srv": "netloader.discovery.dns_records:open_dns",
    },
}


def core_requirements(of: str = "netloader") -> Iterator[str]:
    """Names of all distributions that `of` needs without any extra, directly or indirectly."""
    for text in importlib.metadata.requires(of) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name
            yield from core_requirements(requirement.name)


def link_distribution(name: str, into: Path) -> None:
    """Make the installed distribution `name` visible in another environment's site-packages."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        link = into / top
        if not link.exists():
            link.symlink_to(Path(str(distribution.locate_file(top))))


def run(python: Path, *arguments: str, **environment: str) -> str:
    """Run `python` outside the checkout, so that only what is installed can be imported. Returns what it printed."""
    done = subprocess.run(
        [str(python), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=python.parent,
        env={"PATH": os.environ["PATH"], **environment},
    )
    assert done.returncode == 0, f"{arguments} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-index", "--no-deps"]
    arguments = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel, its declared dependencies and nothing else."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python3*/site-packages")
    python = home / "bin" / "python"
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python), "install"]
    subprocess.run([sys.executable, *pip, "--no-index", "--no-deps", str(wheel)], check=True, timeout=100)
    for name in sorted(set(core_requirements())):
        link_distribution(name, site)
    return python


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "netloader").rglob("*.py")}
    assert {"netloader/transports/base.py", "netloader/vllm/plugin.py", "netloader/codecs/frames.py"} <= expected
    assert names - information == expected | {"netloader/py.typed", "netloader/vllm/model/settings.toml"}
    assert any(name.endswith("/licenses/LICENSE") for name in information)


def test_the_wheel_has_few_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = {
        Requirement(line.partition(": ")[2]).name
        for line in lines
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert required == {"anyio", "msgspec", "xxhash"}
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines


def test_import_works_with_the_core_dependencies_alone(bare: Path) -> None:
    for package in HEAVY:
        found = run(bare, "-c", f"import importlib.util as u; print(u.find_spec({package!r}))")
        assert found.strip() == "None", f"{package} is visible in the bare environment"
    program = (
        "import importlib.metadata, json, netloader\n"
        "missing = [name for name in netloader.__all__ if name not in dir(netloader)]\n"
        "version = importlib.metadata.version('netloader')\n"
        "print(json.dumps({'file': netloader.__file__, 'version': version, 'missing': missing}))"
    )
    seen = json.loads(run(bare, "-W", "error", "-c", program))
    assert Path(seen["file"]).is_relative_to(bare.parents[1])
    assert seen["version"] == importlib.metadata.version("netloader")
    assert seen["missing"] == []


def test_what_needs_torch_says_how_to_get_it(bare: Path) -> None:
    program = (
        "import netloader\n"
        "try: netloader.sync.pull({}, sources=['127.0.0.1:1'])\n"
        "except ModuleNotFoundError as error: print(netloader.__version__, error.name, *error.__notes__)"
    )
    version = importlib.metadata.version("netloader")
    assert run(bare, "-W", "error", "-c", program).strip() == f"{version} torch netloader: {TORCH_HINT}"


def test_every_public_name_resolves() -> None:
    for name in netloader.__all__:
        assert getattr(netloader, name) is not None
    assert len(set(netloader.__all__)) == len(netloader.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        netloader.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("netloader.cli", ("main",)),
        ("netloader.config", ("Config", "ConfigErrors", "FORMAT_NAMES", "load_config")),
        ("netloader.errors", ("NetloaderError", "PeerLost")),
        ("netloader.progress", ("ProgressBar", "ProgressLog")),
        ("netloader.sync", ("probe", "pull", "pull_new", "serve")),
        ("netloader.transports.base", ("BlockView", "Channel", "Landed", "Pending", "Setup", "Signals", "Transport")),
        ("netloader.transports.conformance", ("check_transport", "pair_maker")),
        ("netloader.transports.faults", ("Fault", "FaultKind", "Faults", "FaultyTransport")),
        ("netloader.transports.hccl_devices", ("hold_still", "move_again")),
        ("netloader.vllm.plugin", ("register",)),
    ],
)
def test_import_paths_of_0_1_still_work(path: str, names: tuple[str, ...]) -> None:
    module = importlib.import_module(path)
    assert [name for name in names if not hasattr(module, name)] == []


def test_import_loads_no_heavy_package_even_if_installed() -> None:
    program = "import json, sys, netloader; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(Path(sys.executable), "-c", program))
    assert "netloader" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_import_is_quick(bare: Path) -> None:
    # The whole process as a user starts it. The machine may be busy, so one quick run of five is sufficient.
    run(bare, "-c", "import netloader")  # writes the byte code
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run(bare, "-c", "import netloader")
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 0.5:
            return
    pytest.fail(f"import netloader takes {min(seconds):.2f} s at best, more than 0.5 s")


def test_entry_points_are_declared(bare: Path) -> None:
    program = (
        "import importlib.metadata as m, json\n"
        "points = m.distribution('netloader').entry_points\n"
        "print(json.dumps([[p.group, p.name, p.value] for p in points]))"
    )
    declared: dict[str, dict[str, str]] = {}
    for group, name, value in json.loads(run(bare, "-c", program)):
        declared.setdefault(group, {})[name] = value
    assert declared == ENTRY_POINTS


@pytest.mark.parametrize(("group", "name"), [("vllm.general_plugins", "netloader"), ("console_scripts", "netloader")])
def test_entry_points_resolve_without_torch_and_vllm(bare: Path, group: str, name: str) -> None:
    program = (
        "import importlib.metadata as m\n"
        f"(point,) = m.entry_points(group={group!r}, name={name!r})\n"
        "print(callable(point.load()))"
    )
    assert run(bare, "-W", "error", "-c", program).strip() == "True"


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS["netloader.transports"]))
def test_transports_resolve_and_know_their_name(bare: Path, name: str) -> None:
    # Transports may use torch: the wheel's netloader comes first, everything else from the environment of the tests.
    here = json.dumps([entry for entry in sys.path if "site-packages" in entry])
    program = (
        f"import importlib.metadata as m, sys; sys.path.extend({here})\n"
        f"(point,) = m.entry_points(group='netloader.transports', name={name!r})\n"
        "print(point.load().name)"
    )
    assert run(bare, "-c", program).strip() == name


def test_the_command_starts_without_torch(bare: Path) -> None:
    command = bare.parent / "netloader"
    done = subprocess.run([command, "--help"], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("demo", "serve", "pull", "probe"):
        assert word in done.stdout
