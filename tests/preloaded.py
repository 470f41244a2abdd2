"""Python processes that need not load torch, which takes longer than most tests: forked from one that has loaded it.

A process started with `PYTHON` in place of ``sys.executable`` is an ordinary child of the one that starts it, with a
pid, pipes, an environment and an exit status of its own, and imports netloader itself. Only torch and a few other
libraries are in its memory before it begins, and stay there at its end. So it is no test of how a process starts, or
of what torch does when it ends, and it shares its addresses with the other forked ones: tests about any of these use
``sys.executable``.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import io
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["PYTHON", "PYTHON_THAT_STARTS_OTHERS", "Keeper", "Preloaded"]

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torch.distributed", "numpy", "anyio._backends._asyncio", "msgspec", "safetensors", "xxhash")
_HIGH = 500
"""Where the descriptors of the forking process are kept, out of the way of those that a child is to have."""
_MESSAGE_BYTES = 1 << 20
_PATIENCE = 60.0
"""Seconds: loading the libraries takes three, on a slow machine."""
_READ_AT_START = ("LD_", "GLIBC_", "MALLOC_", "PYTHON")
"""How the names of variables begin that the loader of libraries, the C library and the interpreter read once."""
_READ_LATER = {"PYTHONPATH", "PYTHONUNBUFFERED"}
"""Those that `Program` reads itself."""
_SUBREAPER = 36
"""``PR_SET_CHILD_SUBREAPER`` of :manpage:`prctl(2)`: orphans among the descendants become this process's children."""


class Preloaded(str):
    """A path of the interpreter. Where nothing is kept loaded, it is just that.

    Args:
        path: Of the interpreter.
        starts_others: The process has a `Keeper` of its own, and its ``sys.executable`` is preloaded too.
    """

    __slots__ = ("starts_others",)

    starts_others: bool

    def __new__(cls, path: str, *, starts_others: bool = False) -> Preloaded:
        self = super().__new__(cls, path)
        self.starts_others = starts_others
        return self


PYTHON = Preloaded(sys.executable)
PYTHON_THAT_STARTS_OTHERS = Preloaded(sys.executable, starts_others=True)


@dataclass(frozen=True)
class Program:
    """What a forked process becomes. Its standard streams travel beside this.

    Attributes:
        arguments: Of the interpreter, without its name: ``-W ACTION``, then ``-m MODULE`` or ``-c TEXT``, and theirs.
        folder: To work in.
        environment: All of it.
        own_session: Whether it gets a session of its own.
        starts_others: See `Preloaded`.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    own_session: bool
    starts_others: bool

    @property
    def possible(self) -> bool:
        """Whether a forked process can do that; a fresh one has more options, and reads its environment anew."""
        rest = self._parsed()[1]
        return (
            len(rest) > 1 and rest[0] in {"-m", "-c"} and _read_at_start(self.environment) == _read_at_start(os.environ)
        )

    def _parsed(self) -> tuple[list[str], list[str]]:
        at = 0
        while self.arguments[at : at + 1] == ["-W"]:
            at += 2
        return self.arguments[1:at:2], self.arguments[at:]

    def run(self) -> None:
        """Be that program. Returns, or raises, where the interpreter would end."""
        actions, (kind, what, *more) = self._parsed()
        for action in actions:
            warnings.simplefilter(action)  # type: ignore[arg-type]  # what is none of the actions is an error there
        sys.path[:0] = ["" if kind == "-c" else self.folder, *filter(None, self._search_path())]
        if kind == "-m":
            sys.argv[:] = ["-m", *more]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = ["-c", *more]
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)

    def _search_path(self) -> list[str]:
        return self.environment.get("PYTHONPATH", "").split(os.pathsep)


class Keeper:
    """A process that has the libraries loaded, and forks when it is told to. Started when it is first needed.

    Args:
        libraries: The modules to import, in this order; those that are not installed are left out.
        environment: Of that process, besides the one that starts it. PYTHONPATH holds for it as well.
        patience: Seconds that importing may take.
    """

    def __init__(
        self,
        libraries: Sequence[str] = LIBRARIES,
        environment: Mapping[str, str] | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        self._patience = patience
        self._libraries = tuple(libraries)
        self._environment = dict(environment or {})
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._fork_exec: Callable[..., int] = vars(subprocess)["_fork_exec"]

    def replace_fork(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Have `subprocess` start what is `Preloaded` here.

        Args:
            patch: ``setattr``, or that of pytest's ``monkeypatch``.
        """
        patch(subprocess, "_fork_exec", self._start)
        # From Python 3.13 on `posix_spawn` starts most processes, unless told not to.
        patch(subprocess, "_USE_POSIX_SPAWN", False)

    def fork_here(self) -> bool:
        """Let a fork of this process, as it is now, be the one that forks.

        Returns:
            Whether this is the caller: False in each process that the fork starts, in time.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            _keep(theirs)
            return False
        theirs.close()
        self._connection = _asking(ours)
        return True

    @property
    def started(self) -> bool:
        """Whether it was started."""
        return self._connection is not None

    def close(self) -> None:
        """End it; the processes that it forked go on."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self, arguments: Sequence[str], *more: Any) -> int:
        """In place of ``subprocess._fork_exec``, with its arguments; returns the pid of the new process."""
        python = arguments[0]
        (_, _, kept, folder, variables, stdin, _, _, stdout, _, stderr, _, _, _, own_session, group, *rest) = more
        usual = len(kept) == 1 and group == -1 and all(value in {None, -1} for value in rest[:5])
        if not isinstance(python, Preloaded) or not usual or sys.platform != "linux":
            return self._fork_exec(arguments, *more)
        program = Program(
            arguments=[os.fspath(argument) for argument in arguments[1:]],
            folder=os.path.abspath(os.fsdecode(folder or ".")),  # noqa: PTH100 - no link is followed
            environment=dict(os.environ) if variables is None else dict(_parted(each) for each in variables),
            own_session=bool(own_session),
            starts_others=python.starts_others,
        )
        if not program.possible:
            return self._fork_exec(arguments, *more)
        streams = [given if given != -1 else number for number, given in enumerate((stdin, stdout, stderr))]
        with self._turn:
            return self._ask(program, streams)

    def _ask(self, program: Program, streams: list[int]) -> int:
        connection = self._connection or self.start()
        _adopt_orphans(True)
        try:
            socket.send_fds(connection, [json.dumps(asdict(program)).encode()], streams)
            answered, _, _ = select.select([connection], [], [], self._patience)
            pid = connection.recv(100) if answered else b""
            if not pid:
                raise RuntimeError(f"the process that forks {'has ended' if answered else 'does not answer'}")
            return int(pid)
        finally:
            _adopt_orphans(False)

    def start(self) -> socket.socket:
        """Let it load the libraries; what it is told meanwhile waits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [path for path in self._environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        text = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import preloaded; "
            f"sys.path.pop(0); sys.path[:0] = {paths!r}; "
            f"preloaded.load_and_keep({theirs.fileno()}, {self._libraries!r})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", text],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._environment},
            )
        self._connection = _asking(ours)
        return self._connection


def load_and_keep(number: int, libraries: Sequence[str]) -> None:
    """The main program of a process that forks; returns in those that it forked, when their program is over."""
    loaded: dict[str, types.ModuleType] = {}
    atexit.register(_leave_in_place, loaded)  # the first one that is registered is the last one that is called
    before = set(sys.modules)
    gc.disable()
    for name in libraries:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    loaded.update((name, module) for name, module in sys.modules.items() if name not in before)
    for finalizer in vars(weakref.finalize)["_registry"]:
        finalizer.atexit = False  # torch's: taking apart its 134 libraries is most of the work of a process that ends
    gc.freeze()
    gc.enable()
    _keep(socket.socket(fileno=number))


def _leave_in_place(loaded: dict[str, types.ModuleType]) -> None:
    """Keep the process's end from taking apart what was loaded before the program began: half a second of work.

    The program's own modules go as ever; the destructors of the libraries' static objects in C++ are left out.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(loaded))
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)  # of what is to be called at the end the newest comes first; it gets the status
    for name, module in loaded.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _keep(connection: socket.socket) -> None:
    connection = _moved_up(connection)
    while True:
        message, streams, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)  # what it has loaded need not be put away
        reading, writing = os.pipe()
        waiting, over = os.pipe()
        between = os.fork()
        if between == 0:
            # The one in between ends at once, so that its child becomes the child of the process that asked.
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            os.close(over)
            os.read(waiting, 1)  # returns when the last one closed it: by then the parent is who asked
            for descriptor in (reading, writing, waiting):
                os.close(descriptor)
            connection.close()
            _become(Program(**json.loads(message)), streams)
            return
        for descriptor in (writing, waiting, *streams):
            os.close(descriptor)
        pid = os.read(reading, 100)
        os.waitpid(between, 0)
        for descriptor in (reading, over):
            os.close(descriptor)
        connection.send(pid)


def _become(program: Program, streams: list[int]) -> None:
    """In the forked process: what the interpreter does before a program begins, and the program."""
    high = [fcntl.fcntl(stream, fcntl.F_DUPFD, _HIGH) for stream in streams]
    for stream in streams:
        os.close(stream)
    for number, stream in enumerate(high):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.environment)
    if program.own_session:
        os.setsid()
    _open_streams()
    _apply_thread_limit(program.environment.get("OMP_NUM_THREADS"))
    keeper = Keeper()
    if program.starts_others:
        if not keeper.fork_here():
            return
        sys.executable = PYTHON
        keeper.replace_fork(setattr)
    program.run()


_replaced: list[Any] = []
"""Streams that a forked process does not use. If they were collected, they would close its descriptors."""


def _open_streams() -> None:
    _replaced.extend((sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__))
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, (name, errors) in enumerate(
        {"stdin": "strict", "stdout": "strict", "stderr": "backslashreplace"}.items()
    ):
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        by_line = number == 2 or raw.isatty()
        stream = io.TextIOWrapper(buffered, "utf-8", errors, line_buffering=by_line, write_through=at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _apply_thread_limit(limit: str | None) -> None:
    """OpenMP has read its variable already."""
    torch: Any = sys.modules.get("torch")
    if limit is not None and torch is not None:
        torch.set_num_threads(int(limit))


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _READ_LATER
    }


def _parted(variable: bytes) -> tuple[str, str]:
    name, _, value = os.fsdecode(variable).partition("=")
    return name, value


def _moved_up(connection: socket.socket) -> socket.socket:
    number = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH)
    connection.close()
    return socket.socket(fileno=number)


def _asking(connection: socket.socket) -> socket.socket:
    connection = _moved_up(connection)
    connection.setblocking(False)
    return connection


def _adopt_orphans(whether: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, int(whether), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
