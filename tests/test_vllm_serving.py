"""The server of a worker process: one server for the process, which ends with it, also if the process is killed."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from netloader import sync
from netloader.api import Server
from netloader.config import Config, load_config
from netloader.core.addresses import parse_address
from netloader.core.identity import ModelIdentity
from netloader.core.protocol import State
from netloader.errors import MemoryStillInUse, NetloaderError
from netloader.tensors import hold
from netloader.transports import registry
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.vllm.load.pulling import pull_raw
from netloader.vllm.serve import server_loop, serving
from netloader.vllm.serve.address_file import AddressFile
from netloader.vllm.serve.file_cleanup import FileCleanup

WAIT = 60.0
STOP_WITHIN = 2.0
TRIES = 3
"""A busy machine may be too slow. If the time is exceeded three times in a row, the cause is in this library."""

TENSORS = {"w": torch.arange(16 << 20, dtype=torch.uint8)}  # more than a channel takes while nobody reads


@pytest.fixture(autouse=True)
def no_server_left() -> Iterator[None]:
    yield
    serving.stop_server()


def config(**fields: Any) -> Config:
    return load_config({"TRANSPORT": "memory", "LISTEN_HOST": "127.0.0.1", **fields})


def started(**fields: Any) -> serving.WorkerServer:
    server = serving.worker_server(config(**fields), 0, "cpu")
    assert server is not None
    return server


def test_a_process_has_one_server_for_all_its_models(caplog: pytest.LogCaptureFixture) -> None:
    first = started()
    assert started() is first
    assert caplog.messages == []
    assert started(MAX_CLIENTS=1) is first
    assert "other settings for it are not used" in caplog.text
    serving.stop_server()
    assert serving.running_server() is None
    assert started() is not first


def test_a_second_stop_does_nothing() -> None:
    server = started()
    server.stop()
    server.stop()
    assert not server.running


def test_the_address_file_is_written_with_the_first_offer_and_removed_with_the_server(tmp_path: Path) -> None:
    server = started(OUTPUT_PREFIX=f"{tmp_path}/rank")
    file = tmp_path / "rank0.txt"
    server.expect("target", "still loading")
    assert not file.exists(), "a reader would find no model yet"
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    assert file.read_bytes() == server.address.encode()
    assert sync.probe(server.address).announcement.identity.model == "m"
    serving.stop_server()
    assert not file.exists()


def test_an_address_file_that_cannot_be_written_costs_the_file_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = started(OUTPUT_PREFIX=f"{tmp_path}/no/such/folder/rank")
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    assert "cannot write the address file" in caplog.text
    assert sync.probe(server.address).announcement.identity.model == "m"


@pytest.mark.parametrize(
    ("base", "rank", "port"), [(0, 0, None), (1023, 0, None), (1023, 1, 1024), (65535, 0, 65535), (65535, 1, None)]
)
def test_a_rank_listens_at_base_plus_rank_or_not_at_all(
    base: int, rank: int, port: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    server = serving.worker_server(config(LISTEN_PORT=base), rank, "cpu")
    if port is None:
        assert server is None
        assert "opens no listener and serves nobody" in caplog.text
    elif server is None:
        assert "Address already in use" in caplog.text, "another program may use this port"
    else:
        assert server.address == f"127.0.0.1:{port}"


def test_the_host_of_vllms_variable_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.7")
    server = serving.worker_server(load_config({"TRANSPORT": "memory"}), 0, "cpu")
    assert server is not None
    assert server.address.startswith("192.0.2.7:")
    serving.stop_server()
    assert started().address.startswith("127.0.0.1:"), "the configured address comes first"


def test_serve_false_and_a_transport_that_cannot_run_serve_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert serving.worker_server(config(SERVE=False), 0, "cpu") is None
    assert "SERVE is false" in caplog.text
    assert serving.worker_server(config(), 0, "npu:0") is None
    assert "no transport can run here" in caplog.text


def test_a_role_that_is_loaded_anew_is_replaced() -> None:
    server = started()
    server.offer(hold(TENSORS, ModelIdentity(model="old")), "detail")
    server.offer(hold(TENSORS, ModelIdentity(model="draft", role="draft")), "detail")
    server.offer(hold(TENSORS, ModelIdentity(model="new")), "detail")
    assert sync.probe(server.address).announcement.identity.model == "new"
    assert sync.probe(server.address, role="draft").announcement.identity.model == "draft"


def test_a_refusal_says_why_and_what_to_do() -> None:
    server = started()
    server.refuse("target", "post-processing left 3 tensors behind", "set INT8_CACHE")
    with pytest.raises(NetloaderError, match=r"left 3 tensors behind \(set INT8_CACHE\)"):
        sync.probe(server.address)


def test_a_client_that_waits_gets_the_model_once_it_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    server = started()
    server.expect("target", "the model is still being loaded")
    target = {"w": torch.zeros_like(TENSORS["w"])}
    client = threading.Thread(
        target=sync.pull,
        args=(target,),
        kwargs={"sources": [server.address], "transport": "memory", "wait": WAIT},
        name="waiting-client",
    )
    client.start()
    deadline = time.monotonic() + WAIT
    while "the model is still being loaded" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    client.join(WAIT)
    assert not client.is_alive()
    assert torch.equal(target["w"], TENSORS["w"])


# --- passing on what is pulled ----------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _pulling(server: serving.WorkerServer) -> bool:
    return any(session.state is State.TRANSFER for session in server._server.sessions)


def _in_thread(function: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[threading.Thread, Future[Any]]:
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments, **more))
        except Exception as error:  # noqa: BLE001 - raised where the result is read
            result.set_exception(error)

    thread = threading.Thread(target=run, name="replica", daemon=True)
    thread.start()
    return thread, result


@contextmanager
def _held_seed() -> Iterator[tuple[str, Faults]]:
    """A seed in an event loop of its own that stops after its first block until it is released."""
    faults = Faults([Fault(FaultKind.HOLD, 0, side=Side.SEND, times=None)])
    with sync.serve(
        TENSORS, ModelIdentity(model="m"), host="127.0.0.1", transport=FaultyTransport(registry.load("memory"), faults)
    ) as seed:
        yield seed.address, faults


@pytest.mark.parametrize("relay", [True, False])
def test_a_worker_that_pulls_passes_on_what_it_has(relay: bool) -> None:
    settings = config(RELAY=relay)
    server = serving.worker_server(settings, 0, "cpu")
    assert server is not None
    server.expect("target", "the model is still being loaded")
    first = {"w": torch.zeros_like(TENSORS["w"])}
    second = {"w": torch.zeros_like(TENSORS["w"])}
    identity = ModelIdentity(model="m")
    with _held_seed() as (seed, faults):
        sources = [parse_address(seed)]
        _, one = _in_thread(pull_raw, first, identity, sources, settings, 0.0, server)
        if not relay:
            faults.release()
            one.result(WAIT)
            with pytest.raises(NetloaderError, match="still being loaded"):
                sync.probe(server.address)
            return
        _wait_for(server._server.holdings.held)
        _, two = _in_thread(sync.pull, second, identity, sources=[seed], transport="memory", timeout=WAIT)
        _wait_for(lambda: _pulling(server))
        assert not one.done()
        faults.release()
        assert one.result(WAIT).blocks
        report = two.result(WAIT)
        assert report.sources[server.address].blocks == report.blocks
        assert torch.equal(first["w"], TENSORS["w"])
        assert torch.equal(second["w"], TENSORS["w"])


@pytest.mark.parametrize("fails", [True, False])
def test_after_the_withdrawal_the_memory_is_free_and_clients_continue_at_the_source(fails: bool) -> None:
    """After a failed pull, the default loader is about to write. After a complete one, post-processing is."""
    settings = config()
    server = serving.worker_server(settings, 0, "cpu")
    assert server is not None
    server.expect("target", "the model is still being loaded")
    first = {"w": torch.zeros_like(TENSORS["w"])}
    second = {"w": torch.zeros_like(TENSORS["w"])}
    identity = ModelIdentity(model="m")
    stuck = Faults([Fault(FaultKind.HOLD, 0, side=Side.RECV)])
    slow = FaultyTransport(registry.load("memory"), stuck)
    with _held_seed() as (seed, faults), sync.serve(TENSORS, identity, host="127.0.0.1", transport="memory") as other:
        with ExitStack() as stack:
            mortal, held = stack.enter_context(_held_seed())
            sources = [parse_address(mortal)]
            _, one = _in_thread(pull_raw, first, identity, sources, settings, 0.0, server)
            _wait_for(server._server.holdings.held)
            wanted = [server.address, other.address if fails else seed]
            _, two = _in_thread(sync.pull, second, identity, sources=wanted, transport=slow, stripe=1, timeout=WAIT)
            _wait_for(lambda: _pulling(server))
            if fails:
                stack.close()  # the seed of the first pull ends before the pull does
                with pytest.raises(NetloaderError):
                    one.result(WAIT)
            else:
                held.release()
                assert one.result(WAIT).blocks
                assert server._server.holdings.held(), "it still serves"
            server.withdraw("target", "post-processing", sources=[seed])
            assert server._server.holdings.held() == ()
            assert not _pulling(server)
            first["w"].zero_()
            faults.release()
            stuck.release()
            report = two.result(WAIT)
        assert torch.equal(second["w"], TENSORS["w"])
        assert sum(share.blocks for share in report.sources.values()) == report.blocks
        server.offer(hold(TENSORS, identity), "detail")
        assert sync.probe(server.address).announcement.identity.model == "m", "it serves the model again"


def test_a_model_that_is_served_already_stays_while_another_one_is_pulled() -> None:
    server = started()
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    (before,) = server._server.holdings.held()
    into = {"w": torch.zeros_like(TENSORS["w"])}
    pull_raw(into, ModelIdentity(model="m"), [parse_address(server.address)], config(), 0.0, server)
    assert torch.equal(into["w"], TENSORS["w"])
    server.withdraw("target", "post-processing")
    assert server._server.holdings.held() == (before,)


# --- the end of the process -----------------------------------------------------------------------------------------


def _blocked_worker(prefix: str, pipe: Pipe) -> None:
    """A worker as vLLM starts it: SIGTERM raises SystemExit. A client's transfer is stalled."""
    signal.signal(signal.SIGTERM, _leave)
    clients: list[threading.Thread] = []

    def wait_for_clients() -> None:
        for one in clients:
            one.join(WAIT)

    # The client stands for another process. The interpreter would stop its thread amid C++ and so abort this one. What
    # is registered first is called last: the server has stopped then.
    atexit.register(wait_for_clients)
    server = started(OUTPUT_PREFIX=prefix)
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    stalled = FaultyTransport(registry.load("memory"), Faults([Fault(FaultKind.STALL, 0, side=Side.RECV)]))
    target = {"w": torch.empty_like(TENSORS["w"])}
    client = threading.Thread(
        target=_ignore_errors,
        args=(sync.pull, target),
        kwargs={"sources": [server.address], "transport": stalled},
        daemon=True,
    )
    clients.append(client)
    client.start()
    while not any(session.state is State.TRANSFER for session in server._server.sessions):
        time.sleep(0.01)
    silent = [socket.create_connection(("127.0.0.1", server._server.port)) for _ in range(3)]
    pipe.send((server.address, len(silent)))
    time.sleep(WAIT)


def _waiting_client(prefix: str, pipe: Pipe) -> None:
    """A worker whose pull waits for a source that does not answer."""
    signal.signal(signal.SIGTERM, _leave)
    server = started(OUTPUT_PREFIX=prefix)
    server.refuse("target", "nothing here", "")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        connected: list[socket.socket] = []

        def tell() -> None:
            connected.append(
                mute.accept()[0]
            )  # kept open, because a client soon leaves a source that closes the connection
            pipe.send((server.address, 0))

        threading.Thread(target=tell, daemon=True).start()
        sync.pull({"w": TENSORS["w"]}, sources=[f"127.0.0.1:{mute.getsockname()[1]}"], transport="memory")


def _idle_worker(prefix: str, pipe: Pipe) -> None:
    """A worker that has nothing to stop."""
    signal.signal(signal.SIGTERM, _leave)
    file = AddressFile(prefix, 0)
    file.write("127.0.0.1:1")
    try:
        pipe.send(("127.0.0.1:1", 0))
        time.sleep(WAIT)
    finally:
        file.remove()


def _leave(*_: object) -> None:
    raise SystemExit


def _ignore_errors(function: Callable[..., object], *arguments: Any, **more: Any) -> None:
    try:
        function(*arguments, **more)
    except NetloaderError:
        return


@pytest.mark.parametrize(
    "context", [multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")], ids=["fork", "spawn"]
)
@pytest.mark.parametrize("worker", [_blocked_worker, _waiting_client])
def test_a_worker_that_is_told_to_end_does_so_at_once(
    context: Any, worker: Callable[..., None], tmp_path: Path
) -> None:
    took: list[float] = []
    while not took or min(took) >= STOP_WITHIN:
        assert len(took) < TRIES, f"seconds from SIGTERM to the end: {took}"
        seconds = _seconds_to_end(context, worker, tmp_path)
        if seconds >= STOP_WITHIN:  # on a busy machine, the time that an idle worker takes to end is subtracted
            seconds -= _seconds_to_end(context, _idle_worker, tmp_path)
        took.append(seconds)


def _seconds_to_end(context: Any, worker: Callable[..., None], tmp_path: Path) -> float:
    """Seconds from SIGTERM to the end of a worker. Its exit status is checked."""
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(f"{tmp_path}/rank", theirs))
    process.start()
    try:
        assert ours.poll(WAIT)
        address, _ = ours.recv()
        file = tmp_path / "rank0.txt"
        assert file.read_text(encoding="ascii") == address
        began = time.monotonic()
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(WAIT)
        took = time.monotonic() - began
        assert process.exitcode == 0
        assert not file.exists()
        return took
    finally:
        process.kill()
        process.join()


def test_the_address_file_is_removed_also_when_the_worker_is_killed(tmp_path: Path) -> None:
    """`vllm serve` kills its workers in the same way."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_waiting_client, args=(f"{tmp_path}/a rank", theirs))
    process.start()
    assert ours.poll(WAIT)
    file = tmp_path / "a rank0.txt"
    assert file.read_text(encoding="ascii") == ours.recv()[0]
    process.kill()
    process.join(WAIT)
    deadline = time.monotonic() + WAIT
    while file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_address_file_that_another_worker_wrote_since_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "rank0.txt"
    file.write_text("10.0.0.1:1", encoding="ascii")
    cleanup = FileCleanup(file, "10.0.0.2:2")
    other = tmp_path / "other"
    other.write_text("10.0.0.3:3", encoding="ascii")
    second = FileCleanup(other, "10.0.0.3:3")
    cleanup.release()
    second.release()
    deadline = time.monotonic() + WAIT
    while other.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert file.exists()


def _forked(address: str, pipe: Pipe) -> None:
    pipe.send(serving.running_server() is None)
    serving.stop_server()


def test_a_child_that_was_forked_leaves_its_parents_server_alone(tmp_path: Path) -> None:
    server = started(OUTPUT_PREFIX=f"{tmp_path}/rank")
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_forked, args=(server.address, theirs))
    process.start()
    assert ours.poll(WAIT)
    assert ours.recv() is True
    process.join(WAIT)
    assert (tmp_path / "rank0.txt").exists()
    assert sync.probe(server.address).announcement.identity.model == "m"


def test_a_result_that_comes_just_before_the_loop_ends_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result may be that a thread still writes into the memory. Then nothing else may fill it."""
    monkeypatch.setattr(server_loop, "_CHECK_INTERVAL", 0.01)
    server = started()
    loop, looked = server._loop, threading.Event()

    async def work() -> None:
        await anyio.to_thread.run_sync(looked.wait)
        raise MemoryStillInUse("the channel", writes=True, seconds=1.0)

    def ends(self: server_loop.ServerLoop) -> bool:
        looked.set()
        _wait_for(answers[0].done)
        return self is not loop

    answers: list[Future[Any]] = []
    begin = loop._begin

    def begun(*arguments: Any) -> Future[Any]:
        answers.append(begin(*arguments))
        return answers[0]

    monkeypatch.setattr(loop, "_begin", begun)
    with monkeypatch.context() as patched:
        patched.setattr(server_loop.ServerLoop, "alive", property(ends))
        with pytest.raises(MemoryStillInUse):
            loop.call_to_completion(work)


@pytest.mark.allow_blocking(reason="the start of a server is held up on purpose")
def test_a_server_that_starts_too_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else could end it, and it would keep its port."""
    monkeypatch.setattr(server_loop, "_START_WITHIN", 0.05)
    goes_on, made = threading.Event(), list[Server]()

    def make() -> Server:
        assert goes_on.wait(WAIT)
        made.append(Server(host="127.0.0.1", transport="memory"))
        return made[0]

    with pytest.raises(TimeoutError):
        server_loop.ServerLoop(make, "late")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "netloader-server"]
    goes_on.set()
    thread.join(WAIT)
    assert made
    assert not thread.is_alive()


def test_what_is_served_is_looked_up_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop may change the table at the same time."""
    server, threads = started(), set[str]()
    server.offer(hold(TENSORS, ModelIdentity(model="m")), "detail")
    held = server._server.holdings.held

    def observed() -> Any:
        threads.add(threading.current_thread().name)
        return held()

    monkeypatch.setattr(server._server.holdings, "held", observed)
    assert server.serves("target") is not None
    assert server.serves("draft") is None
    assert threads == {"netloader-server"}
