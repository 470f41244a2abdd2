"""The shm transport: blocks between two processes of one machine."""

from netloader.transports.shm.transport import ShmTransport

__all__ = ["ShmTransport"]
