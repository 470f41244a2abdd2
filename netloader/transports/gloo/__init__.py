"""The gloo transport: blocks as point-to-point operations of a process group of two."""

from netloader.transports.gloo.transport import GlooTransport

__all__ = ["GlooTransport"]
