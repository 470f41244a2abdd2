"""How a pull and a server behave: made once, from what the caller gave, and handed down whole. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.choice import Here
from netloader.core.identity import Layout, Role

__all__ = ["PullOptions", "ServeOptions", "Timings"]


@dataclass(frozen=True, slots=True)
class Timings:
    """The deadlines of a session, in seconds.

    Attributes:
        hello: From the connection to the end of LISTEN.
        validate: Between two messages while validating, or while waiting for a turn.
        plan: From the announcement to the open channel.
        stall: Between two blocks, or two requests for blocks.
        finalize: From verdict to goodbye.
    """

    hello: float = 10.0
    validate: float = 30.0
    plan: float = 120.0
    stall: float = 30.0
    finalize: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """How a pull behaves.

    Attributes:
        timeout: Seconds that the whole pull may take.
        wait: Seconds to keep trying sources that are not up, or answer "not ready" or "busy", and to wait for more.
        connect_timeout: Seconds that connecting to one source may take, and finding the first ones.
        tries: Sessions with one source that may break after they brought something, before it is given up.
        stripe: Sources to pull from at once.
        follow: Go to a relay when a server redirects to it.
        max_hops: Relays that blocks may pass through on their way here.
        role: What to ask about when there is no identity.
        layouts: Layouts that can be taken when there is no identity.
        token: Shared secret, or None.
        expect_root: Root that is required, in hex; empty to take that of the first source.
        unavailable: Why transports that were not handed over can't be used, by name; for the log.
        max_bytes: Largest model that is adopted.
        here: Where this client runs, for choosing among sources that are one of many.
        timings: Deadlines of each session.
        software: Name and version, told to servers.
    """

    timeout: float = 1200.0
    wait: float = 0.0
    connect_timeout: float = 10.0
    tries: int = 2
    stripe: int = 4
    follow: bool = True
    max_hops: int = 32
    role: Role = "target"
    layouts: tuple[Layout, ...] = ("raw", "processed", "checkpoint")
    token: bytes | None = field(default=None, repr=False)
    expect_root: str = ""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = 1 << 44
    here: Here = field(default_factory=Here)
    timings: Timings = Timings()
    software: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a server behaves.

    Attributes:
        host: Address to bind, None for all of IPv6 and IPv4.
        port: Port to bind, 0 for a free one that the kernel chooses.
        max_clients: Clients served at once; more wait for their turn.
        fan_out: Clients served directly before newcomers are redirected to those that relay; 0 for never.
        max_bandwidth: Bytes that all clients together are sent per second; None for no limit.
        max_queue: Clients that may wait; more are refused with "busy".
        max_strangers: Connections without a turn or a place in the queue; the oldest is dropped for a new one.
        max_open_blocks: Blocks that one client may have asked for and not yet been sent: by default more than fit into
            any client's window, and little memory.
        token: Shared secret that clients have to know, or None.
        stop_within: Seconds that stopping may take.
        timings: Deadlines of each session.
        software: Name and version, told to clients.
    """

    host: str | None = None
    port: int = 0
    max_clients: int = 8
    fan_out: int = 1
    max_bandwidth: float | None = None
    max_queue: int = 256
    max_strangers: int = 128
    max_open_blocks: int = 1 << 17
    token: bytes | None = field(default=None, repr=False)
    stop_within: float = 1.0
    timings: Timings = Timings()
    software: str = ""
