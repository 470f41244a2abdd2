"""Graphs of the simulated device: operators are recorded with their tensors, and run again on the same ones."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NPUGraph:
    """A captured graph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def replay(self) -> None:
        """Run the operators again on the same memory, with its present contents."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, into: NPUGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._into = into

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._into.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class graph:  # noqa: N801 - torch_npu's name
    """Capture the operators that run in the body."""

    def __init__(self, npu_graph: NPUGraph) -> None:
        self._recorder = _Recorder(npu_graph)

    def __enter__(self) -> None:
        self._recorder.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
