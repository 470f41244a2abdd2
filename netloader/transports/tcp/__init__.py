"""The tcp transport: blocks over several plain connections."""

from netloader.transports.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
