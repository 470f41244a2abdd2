"""Every error of the package arrives whole in another process: its text, its hint and its fields."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import netloader
from netloader import errors as e
from netloader.config import ConfigErrors
from netloader.core.protocol.context import Refuse

_BAD = e.ConfigError(field="WAIT", value=[-1, {"a": b"b"}], allowed="seconds", reason="too small", hint="leave it out")
_LOST = e.PeerLost("10.0.0.7:1 cannot be reached: Connection refused", hint="is it running?")

SAMPLES: dict[str, Any] = {
    "ConfigError": lambda: _BAD,
    "ConfigErrors": lambda: ConfigErrors([_BAD, e.ConfigError(field="X", value=1, allowed="none")]),
    "ManifestError": lambda: e.ManifestError("differs", problems=[f"tensor {n}" for n in range(30)], hint="look"),
    "RefusedError": lambda: e.RefusedError("busy", "full", hint="later", retry_after=2.0, sources=("10.0.0.8:1",)),
    "Refuse": lambda: Refuse("busy", "full", hint="later", retry_after=2.0, sources=("10.0.0.8:1",)),
    "MemoryStillInUse": lambda: e.MemoryStillInUse("tcp", [threading.current_thread()], writes=True, seconds=5.0),
    "DigestMismatch": lambda: e.DigestMismatch(3, ["a", "b", "c", "d"], "00", "ff"),
    "RootMismatch": lambda: e.RootMismatch("00", "ff", "EXPECT_ROOT"),
    "AttemptFailed": lambda: e.AttemptFailed("10.0.0.7:1", _LOST, 3),
    "NoSourceLeft": lambda: e.NoSourceLeft([e.AttemptFailed("10.0.0.7:1", _LOST, 3)], verified=1, total=2, advice="x"),
    "ServerLost": lambda kind: kind("it ended"),
    "EtcdRefusal": lambda kind: kind("permission denied", code=7, hint="look"),
    "NotRestored": lambda kind: kind(["w"]),
}


def classes() -> list[type[e.NetloaderError]]:
    for module in pkgutil.walk_packages(netloader.__path__, "netloader."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[e.NetloaderError]) -> Iterator[type[e.NetloaderError]]:
        yield kind
        for one in kind.__subclasses__():
            if one.__module__.startswith("netloader"):
                yield from below(one)

    return sorted(below(e.NetloaderError), key=lambda kind: kind.__name__)


def sample(kind: type[e.NetloaderError]) -> e.NetloaderError:
    if kind.__init__ is e.NetloaderError.__init__:
        made = kind("what was wrong", hint="what to do")
    else:
        make = SAMPLES[kind.__name__]  # a class with arguments of its own needs a sample above
        made = make(kind) if inspect.signature(make).parameters else make()
    made.story = ("LISTEN -> VALIDATE",)
    return made


def fields(error: e.NetloaderError) -> dict[str, Any]:
    """The attributes as data: errors in them are given by their text."""

    def plain(value: Any) -> Any:
        if isinstance(value, e.NetloaderError):
            return type(value), str(value), fields(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in vars(error).items() if not name.startswith("_")}


def same(one: BaseException, other: e.NetloaderError) -> None:
    assert type(one) is type(other)
    assert str(one) == str(other)
    assert isinstance(one, e.NetloaderError)
    assert (one.message, one.hint, one.args) == (other.message, other.hint, other.args)
    assert fields(one) == fields(other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_error_is_equal_after_pickling_and_copying() -> None:
    found = classes()
    assert len(found) > 25
    for kind in found:
        error = sample(kind)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            same(pickle.loads(pickle.dumps(error, protocol)), error)
        same(copy.copy(error), error)
        same(copy.deepcopy(error), error)


def test_a_value_that_cannot_be_pickled_arrives_as_text() -> None:
    error = e.ConfigError(field="progress", value=lambda: None, allowed="a function")
    arrived = pickle.loads(pickle.dumps(error))
    assert str(arrived) == str(error)
    assert "<lambda>" in arrived.value


def test_memory_in_use_by_another_process_counts_as_in_use() -> None:
    thread = threading.Thread(target=lambda: None)
    error = e.MemoryStillInUse("tcp", [thread], writes=True, seconds=5.0)
    assert not error.lasts
    assert pickle.loads(pickle.dumps(error)).lasts, "nobody here can know that its thread ended"


def fail(number: int) -> None:
    raise [sample(e.NoSourceLeft), sample(e.ConfigError), sample(e.DigestMismatch)][number]


def test_a_process_pool_raises_the_error_itself() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for number, kind in enumerate((e.NoSourceLeft, e.ConfigError, e.DigestMismatch)):
            raised = pool.submit(fail, number).exception(60)
            assert raised is not None
            same(raised, sample(kind))
