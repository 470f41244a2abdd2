"""The HCCL transport: blocks from NPU to NPU over a process group of two."""

from netloader.transports.hccl.transport import HcclTransport

__all__ = ["HcclTransport"]
