"""Real `vllm serve` processes: start them as a user does, send HTTP requests, kill them, and clean up.

Every engine writes its log to a file; every wait has a deadline. Each engine has its own
process group, so that after kill -9 of one member the others can be found and ended.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from netloader.vllm.serve.address_file import SERVING_PATTERN

T = TypeVar("T")

READY_TIMEOUT = 600.0
STOP_TIMEOUT = 30.0
POLL = 0.2

# Settings that keep an engine small enough for three of them side by side on two cores.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
ARGUMENTS = ("--max-model-len", "512", "--gpu-memory-utilization", "0.2", "--max-num-seqs", "8")


class EngineFailed(AssertionError):
    """The engine ended, or did not reach a state in time; the message ends with its log."""


def wait_for(condition: Callable[[], T | None], timeout: float, what: str) -> T:
    """Poll `condition` until it returns something other than None or False."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise EngineFailed(f"waited {timeout:.0f} s for {what}")
        time.sleep(POLL)


@dataclass(frozen=True)
class Token:
    """One generated token with its most likely alternatives, as the API shows them."""

    text: str
    top: tuple[tuple[str, float], ...]


@dataclass
class Engine:
    """One `vllm serve` process.

    Attributes:
        process: The process that was started; its children are the engine core and the workers.
        port: Where its HTTP API listens.
        log: The file of its output.
        name: The model name that requests use.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    name: str

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def lines(self, part: str) -> list[str]:
        """The log lines that contain `part`."""
        return [line for line in self.text().splitlines() if part in line]

    def fail(self, why: str) -> EngineFailed:
        """An error with the end of the log in it."""
        tail = "\n".join(self.text().splitlines()[-60:])
        return EngineFailed(f"{why}; its log ends with:\n{tail}")

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> Engine:
        """Wait until the HTTP API answers."""
        wait_all_ready(self, timeout=timeout)
        return self

    def answers_health(self) -> bool:
        """Whether the HTTP API answers; an engine that has ended is an error."""
        if self.process.poll() is not None:
            raise self.fail(f"the engine ended with status {self.process.returncode} before it was ready")
        try:
            return self.get("/health")[0] == http.client.OK
        except OSError:
            return False

    def wait_ended(self, timeout: float = READY_TIMEOUT) -> int:
        """Wait until the process has ended by itself; its exit status."""
        with self._explained():
            return wait_for(lambda: _status(self.process), timeout, f"the end of {self.name}") - _OFFSET

    def wait_line(self, part: str, timeout: float = READY_TIMEOUT) -> str:
        """Wait for a log line that contains `part`."""

        def found() -> str | None:
            lines = self.lines(part)
            if lines:
                return lines[0]
            if self.process.poll() is not None:
                raise self.fail(f"the engine ended without logging {part!r}")
            return None

        with self._explained():
            return wait_for(found, timeout, f"a log line with {part!r}")

    def addresses(self) -> dict[int, str]:
        """The address of each rank's netloader server, as the log names it."""
        found = re.finditer(SERVING_PATTERN, self.text())
        return {int(match["rank"]): match["address"] for match in found}

    def wait_addresses(self, ranks: int = 1, timeout: float = READY_TIMEOUT) -> dict[int, str]:
        """Wait until `ranks` ranks have logged their address."""

        def all_there() -> dict[int, str] | None:
            found = self.addresses()
            return found if len(found) >= ranks else None

        with self._explained():
            return wait_for(all_there, timeout, f"the addresses of {ranks} ranks")

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """GET `path`; status and body."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> Any:
        """POST JSON to `path`; the answer's JSON."""
        status, answer = self._request("POST", path, json.dumps(body).encode(), timeout)
        if status != http.client.OK:
            raise EngineFailed(f"{path} answered {status}: {answer[:500]!r}")
        return json.loads(answer) if answer else None

    def complete(self, prompt: str, tokens: int = 16, top: int = 5, timeout: float = 120.0) -> tuple[Token, ...]:
        """Generate `tokens` tokens greedily, each with its `top` likeliest alternatives and their logprobs."""
        body = {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
        }
        choice = self.post("/v1/completions", body, timeout)["choices"][0]["logprobs"]
        return tuple(
            Token(text, tuple(sorted(alternatives.items(), key=lambda pair: (-pair[1], pair[0]))))
            for text, alternatives in zip(choice["tokens"], choice["top_logprobs"], strict=True)
        )

    def answers(self, prompts: Sequence[str], tokens: int = 16, timeout: float = 120.0) -> dict[str, tuple[Token, ...]]:
        """`complete` for each prompt; equal for two engines with equal weights."""
        return {prompt: self.complete(prompt, tokens, timeout=timeout) for prompt in prompts}

    def members(self) -> list[Member]:
        """The processes of this engine that are alive.

        The engine was started as the leader of a process group; its children stay in it, orphaned or not.
        """
        return [member for member in _all_members() if member.group == self.process.pid]

    def worker(self, rank: int = 0) -> Member:
        """The process that holds the weights of `rank`; a single worker carries no rank in its title."""
        members = self.members()
        for title in (f"VLLM::Worker_TP{rank}", f"VLLM::Worker_PP{rank}", "VLLM::Worker", "VLLM::EngineCore"):
            for member in members:
                if member.title == title:
                    return member
        raise self.fail(f"no process of rank {rank} among {[member.title for member in members]}")

    def stand_back(self) -> None:
        """Lower the scheduling priority of its processes until the engine is stopped.

        vLLM's workers spin for a while after each request. Where the kernel schedules by session (autogroup), one that
        spins was seen to leave 2 % of its core to engines that start, and "nice" changes nothing between sessions.
        """
        self._stand(15)

    def _stand(self, behind: int) -> None:
        group = Path(f"/proc/{self.process.pid}/autogroup")
        with contextlib.suppress(OSError):  # a kernel without it, no right to it, or a process that has ended
            group.write_text(str(behind), encoding="ascii")

    def kill(self) -> None:
        """kill -9 of every member, at once."""
        for member in self.members():
            member.kill()
        self.process.wait(STOP_TIMEOUT)
        wait_for(lambda: not self.members(), STOP_TIMEOUT, f"the end of {self.name} after kill -9")

    def stop(self, timeout: float = STOP_TIMEOUT) -> float:
        """Ask the engine to end as a service manager does (SIGTERM); the seconds until all its processes had ended.

        Whatever is left after `timeout` is killed, and that is a failure.
        """
        begun = time.monotonic()
        if self.process.poll() is None:
            self._stand(0)
            self.process.send_signal(signal.SIGTERM)
        try:
            wait_for(lambda: self.process.poll() is not None and not self.members(), timeout, "its end after SIGTERM")
        except EngineFailed:
            left = [member.title for member in self.members()]
            self.kill()
            raise self.fail(f"still running {timeout:.0f} s after SIGTERM: {left}") from None
        return time.monotonic() - begun

    def close(self) -> None:
        """End the engine whatever state it is in."""
        if self.process.poll() is None:
            with contextlib.suppress(EngineFailed):
                self.stop()
        self.kill()

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except EngineFailed as error:
            if "its log ends with" in str(error):
                raise
            raise self.fail(str(error)) from None


_OFFSET = 1 << 16  # distinguishes a status, also 0, from "still running"


def wait_all_ready(*started: Engine, timeout: float = READY_TIMEOUT) -> None:
    """Wait until the HTTP APIs of several engines answer; the first one that ends ends the wait."""
    waiting = list(started)
    deadline = time.monotonic() + timeout
    while waiting:
        for one in tuple(waiting):
            if one.answers_health():
                waiting.remove(one)
        if waiting and time.monotonic() > deadline:
            raise waiting[0].fail(f"waited {timeout:.0f} s for the API of an engine")
        time.sleep(POLL)


def _status(process: subprocess.Popen[bytes]) -> int | None:
    status = process.poll()
    return None if status is None else status + _OFFSET


@dataclass(frozen=True)
class Member:
    """One process, identified by number and start time, because numbers are reused."""

    pid: int
    group: int
    born: int
    title: str = field(compare=False)  # vLLM changes it

    def alive(self) -> bool:
        """Whether the process still runs."""
        return _member(self.pid) == self

    def kill(self) -> None:
        """kill -9, unless it has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _all_members() -> list[Member]:
    found = (_member(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [member for member in found if member is not None]


def _member(pid: int) -> Member | None:
    folder = Path(f"/proc/{pid}")
    try:
        # The name in brackets may hold anything; the fields after it are state, parent, group and so on.
        fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        title = (folder / "cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
        # A process whose first thread has ended keeps its sockets open until its last thread ends.
        ended = fields[0] == "X" or (fields[0] == "Z" and len(list((folder / "task").iterdir())) <= 1)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if ended else Member(pid, int(fields[2]), int(fields[19]), title)


@contextlib.contextmanager
def engine(
    model: Path | str,
    log: Path,
    *arguments: str,
    name: str = "tiny",
    environment: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    load_format: str = "netloader",
    tensor_parallel: int = 1,
    small: bool = True,
    folder: Path | None = None,
    niceness: int = 0,
) -> Iterator[Engine]:
    """Start `vllm serve MODEL` the way the guide does, and end it on leaving. It is not awaited: see `wait_ready`.

    Args:
        model: Folder or name of the model.
        log: File for its output.
        arguments: More arguments of the command line.
        name: `--served-model-name`.
        environment: More environment variables.
        config: The value of `--model-loader-extra-config`; left out when None.
        load_format: The value of `--load-format`.
        tensor_parallel: The value of `--tensor-parallel-size`.
        small: Whether to add ARGUMENTS; without them the command line is the guide's, and nothing more.
        folder: Where to start it; a relative `model` is found from there.
        niceness: The nice value: higher means less processor time when processors are scarce.
    """
    port = free_port()
    command = [
        *("nice", "-n", str(niceness)),
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model)),
        *("--tensor-parallel-size", str(tensor_parallel)),
        *("--served-model-name", name),
        "--enforce-eager",
        *("--port", str(port)),
        *("--load-format", load_format),
        *(ARGUMENTS if small else ()),
        *arguments,
    ]
    if config is not None:
        command.append(f"--model-loader-extra-config={json.dumps(config)}")
    settings = dict(environment or {})
    if tensor_parallel > 1:
        # vLLM wants a memory node per rank otherwise.
        settings.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in range(tensor_parallel)))
    with launched(command, log, port=port, name=name, environment=settings, folder=folder) as started:
        yield started


@contextlib.contextmanager
def launched(
    command: Sequence[str],
    log: Path,
    *,
    port: int,
    name: str = "tiny",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    base: Mapping[str, str] = ENVIRONMENT,
) -> Iterator[Engine]:
    """Start an engine by a whole command line, and end it on leaving. It is not awaited.

    Args:
        command: The command line; a command `vllm` is that of this Python.
        log: File for its output.
        port: The port of its HTTP API, as the command line has it.
        name: The model name that requests use.
        environment: More environment variables.
        folder: Where to start it.
        base: Environment variables that `environment` may replace.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    settings = {**os.environ, "PATH": path, **base, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_with_stand_in(settings, log.parent),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    started = Engine(process, port, log, name)
    try:
        yield started
    finally:
        started.close()


def _with_stand_in(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """An environment in which the CPU build of vLLM 0.32 runs. Two of its faults are mended from outside.

    The command `vllm` asks for the version of a distribution called "vllm"; the CPU build is called "vllm-cpu", and
    without an answer the command ends. And its attention uses the AMX registers of a processor without having asked
    the kernel for them, so that the process ends with "illegal instruction", unless torch's compiler has asked before.
    A distribution on the path gives the answer, and a plugin that asks; here and in child processes.
    """
    build = _version_of("vllm-cpu")
    if build is None or _version_of("vllm") is not None:
        return environment
    version = f"{build}+cpu"
    stand_in = folder / "vllm-by-name"
    info = stand_in / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="ascii")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_ASKS} = {_ASKS}:ask\n", encoding="ascii")
    (stand_in / f"{_ASKS}.py").write_text(_ASK, encoding="ascii")
    path = [str(stand_in), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_ASKS = "asks_for_amx"

_ASK = """
def ask():
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
"""


def free_port() -> int:
    """A port that is free now."""
    # vLLM binds the HTTP port itself; it cannot take over an open socket.
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class RequestLoop:
    """Sequential requests from a thread during the block; records the time of every answer.

    Attributes:
        think: Seconds between an answer and the next request: without any, an engine leaves no processor time to others
            that start on the same cores.
        timeout: Seconds for one request.
        pauses: Seconds from each request to its answer.
        errors: Messages of failed requests.
        answers: Distinct answers seen.
    """

    engine: Engine
    prompt: str
    tokens: int = 8
    think: float = 0.0
    timeout: float = 120.0
    pauses: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answers: set[tuple[Token, ...]] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> RequestLoop:
        self._thread = threading.Thread(target=self._run, name="request-loop")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Wait for the pending answer, and send no further request."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def wait_requests(self, count: int, timeout: float = 120.0) -> None:
        """Wait until `count` more requests were answered."""
        goal = len(self.pauses) + count
        wait_for(lambda: len(self.pauses) >= goal or bool(self.errors), timeout, f"{count} more answers")

    def longest(self, since: int = 0) -> float:
        """The longest pause among the requests from number `since` on."""
        return max(self.pauses[since:])

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.answers.add(self.engine.complete(self.prompt, self.tokens, timeout=self.timeout))
            except (OSError, EngineFailed, http.client.HTTPException, ValueError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return
            self.pauses.append(time.monotonic() - begun)
            self._stop.wait(self.think)
