"""The backend ``hccl`` of torch.distributed: gloo, with the tensors of the device copied to the host and back.

Pairs made with ProcessGroupHCCL itself are another matter: see `_hccl`.
"""

# mypy: disable-error-code="override"
# What is handed in is handed on.

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ._device import is_npu
from ._formats import to_cpu, write_back

_numbers = itertools.count()


class _Ended:
    """Work that has ended. Gloo's own may be waited for only once; that of HCCL as often as one likes."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(None)
        return future


class CollectiveGroup(dist.ProcessGroup):
    """A group of any number of ranks, as torch.distributed makes it for the backend ``hccl``."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = self._communicator = f"sim_hccl_{next(_numbers)}"

    def _get_backend(self, device: Any) -> CollectiveGroup:
        return self

    def _get_backend_name(self) -> str:
        return "hccl"

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "hccl"

    @property
    def pg_name(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        return None

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """The name of the communicator, which operators take: another one for each group of a process."""
        return self._communicator

    def barrier(self, opts: Any = None) -> _Ended:
        self._gloo.barrier().wait()
        return _Ended()

    def allreduce(self, *given: Any) -> _Ended:
        return self._run("allreduce", given)

    def broadcast(self, *given: Any) -> _Ended:
        return self._run("broadcast", given)

    def allgather(self, *given: Any) -> _Ended:
        return self._run("allgather", given)

    def _allgather_base(self, *given: Any) -> _Ended:
        return self._run("_allgather_base", given)

    all_gather_single = _allgather_base  # type: ignore[assignment]  # its name in newer releases of torch

    def send(self, *given: Any) -> _Ended:
        return self._run("send", given)

    def recv(self, *given: Any) -> _Ended:
        return self._run("recv", given)

    def _run(self, name: str, given: tuple[Any, ...]) -> _Ended:
        on_host = [_on_host(x) for x in given]
        getattr(self._gloo, name)(*on_host).wait()
        for x, copy in zip(given, on_host, strict=True):
            _copy_back(x, copy)
        return _Ended()


def _on_host(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_on_host(part) for part in x]
    return to_cpu(x).clone() if is_npu(x) else x


def _copy_back(x: Any, copy: Any) -> None:
    if isinstance(x, list | tuple):
        for part, other in zip(x, copy, strict=True):
            _copy_back(part, other)
    elif is_npu(x):
        to_cpu(x).copy_(copy)
        write_back(x, copy)


def install() -> None:
    """Make the backend known to torch.distributed."""
    if "hccl" not in dist.Backend.backend_list:
        dist.Backend.register_backend("hccl", CollectiveGroup, devices=["npu"])
