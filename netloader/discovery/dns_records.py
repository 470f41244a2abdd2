"""``dns://NAME:PORT`` and ``dns+srv://NAME``: the servers that a name stands for, such as a headless Service.

Needs dnspython (the extra ``dns``). It reads /etc/resolv.conf, with search domains and ndots, but not /etc/hosts.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

import anyio
import anyio.to_thread
import dns.asyncresolver
import dns.exception
import dns.resolver

from netloader.core.addresses import Address, parse_address, parse_host
from netloader.core.sources import MAX_KNOWN, Source
from netloader.core.texts import one_line
from netloader.discovery.base import Listed, SourceChange, Wanted
from netloader.discovery.outage import Outage
from netloader.discovery.told import Told
from netloader.errors import ConfigError, DiscoveryError

__all__ = ["Dns", "DnsName", "open_dns"]

_EVERY = (1.0, 30.0)
"""Seconds between two questions: at least, and at most. Between them, the TTL of the answer decides."""

_NOTHING_YET = 2.0
"""Seconds until the next question if the name has no records yet."""

_RETRY = 2.0
"""Seconds until the next question if there was no answer."""

_PATIENCE = 5.0
"""Seconds for an answer, over all name servers."""

_KEEP = 15.0
"""Seconds for which a record that is not in the answer any more counts: some name servers answer with a part."""

_AT_A_TIME = 16
"""Questions about the targets of SRV records that are asked at a time."""

_PORT = 53
_RANK = "{rank}"
_HIGHEST_PORT = 65535
_ALLOWED = {
    "dns": "dns://NAME:PORT, where NAME may contain {rank}; otherwise the rank is added to PORT",
    "dns+srv": "dns+srv://NAME, where NAME may contain {rank}; otherwise the rank is added to the ports of the records",
}
_PARAMETERS = "parameters: server=IP:PORT (a name server), family=4, 6 or any"

_log = logging.getLogger("netloader")

_Family = Literal["4", "6", "any", ""]


@dataclass(frozen=True, slots=True)
class DnsName:
    """What a URL says.

    Attributes:
        name: The name; ``{rank}`` in it stands for the rank.
        port: The port; None if SRV records say it.
        server: The name server; None for those of this host.
        family: ``4`` for A records, ``6`` for AAAA records, ``any`` for both, empty for AAAA only if there is no A.
    """

    name: str
    port: int | None
    server: Address | None = None
    family: _Family = ""

    def of_rank(self, rank: int) -> str:
        """The name to ask for."""
        return self.name.replace(_RANK, str(rank))

    def port_of(self, base: int, rank: int) -> int:
        """The port of a rank."""
        return base if _RANK in self.name else base + rank


def open_dns(url: str) -> Dns:
    """The backend of ``dns://NAME:PORT`` or ``dns+srv://NAME``.

    Raises:
        ConfigError: The URL is wrong.
    """
    return Dns(_parse(url))


def _parse(url: str) -> DnsName:
    scheme = url.partition(":")[0].lower()

    def wrong(reason: str) -> ConfigError:
        return ConfigError(field="url", value=url, allowed=f"{_ALLOWED[scheme]}; {_PARAMETERS}", reason=reason)

    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise wrong(str(error)) from None
    if not parts.netloc and parts.path:
        raise wrong("// is missing before the name")
    if parts.path not in {"", "/"} or parts.fragment:
        raise wrong("nothing but parameters may follow the name")
    name, port = _name_and_port(parts.netloc, scheme, wrong)
    server: Address | None = None
    family: _Family = ""
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        match key, value:
            case "server", _:
                server = _server(value, wrong)
            case "family", ("4" | "6" | "any") as family:
                pass
            case "family", _:
                raise wrong(f"family is {value!r}")
            case _:
                raise wrong(f"there is no parameter {key!r}")
    return DnsName(name, port, server, family)


def _name_and_port(text: str, scheme: str, wrong: Callable[[str], ConfigError]) -> tuple[str, int | None]:
    if "@" in text:
        raise wrong("there is no user name in it")
    name, colon, port = text.partition(":")
    plain = name.replace(_RANK, "0")
    if "[" in text or re.fullmatch(r"[0-9.]+", plain):
        raise wrong("this is an address: give it as a source")
    if scheme == "dns" and not colon:
        raise wrong("the port is missing")
    if scheme == "dns+srv" and colon:
        raise wrong("SRV records have their own ports")
    try:
        parse_address(f"{plain.removesuffix('.')}:{port if colon else 1}", field="url")
    except ConfigError as error:
        raise wrong(error.reason or str(error)) from None
    return name, int(port) if colon else None


def _server(value: str, wrong: Callable[[str], ConfigError]) -> Address:
    try:
        host = parse_host(value) if value.count(":") != 1 and not value.startswith("[") else None
        server = parse_address(value) if host is None else Address(host, _PORT)
        ipaddress.ip_address(server.host)
    except (ConfigError, ValueError):
        raise wrong(f"server is {value!r}, which is no IP address") from None
    return server


class Dns:
    """Finds servers by the records of a name. A `Backend` that others fill, and that can't claim.

    Args:
        name: What to ask for.
    """

    def __init__(self, name: DnsName) -> None:
        self._name = name

    def sources(self, wanted: Wanted) -> DnsSources:
        """See :meth:`netloader.discovery.Backend.sources`. DNS knows no keys and no roles.

        Raises:
            ConfigError: The port of this rank would be too high.
        """
        port = self._name.port
        if port is not None and self._name.port_of(port, wanted.rank) > _HIGHEST_PORT:
            allowed = f"a port that is at most {_HIGHEST_PORT} when rank {wanted.rank} is added"
            raise ConfigError(field="port", value=port, allowed=allowed)
        return DnsSources(self._name, wanted.rank)

    def publisher(self) -> None:
        """Nothing: the records are made by whoever runs the name server."""
        return

    def claims(self) -> None:
        """Nothing: DNS can't."""
        return


class DnsSources:
    """The servers of one rank. A `SourceProvider`.

    Args:
        name: What to ask for.
        rank: The rank.
    """

    def __init__(self, name: DnsName, rank: int) -> None:
        self._name = name
        self._rank = rank

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`. It ends when it is closed only, and raises nothing."""
        asked = _Questions(self._name, self._rank)
        outage = Outage(f"finding sources by DNS ({self._name.of_rank(self._rank)})")
        told, listed = Told(_KEEP), False
        while True:
            try:
                found, ttl = await asked.sources()
            except DiscoveryError as error:
                outage.failed(error)
                told.unknown()
                pause = _RETRY
            else:
                outage.over()
                for change in told.changes(found, anyio.current_time()):
                    yield change
                if not listed:
                    listed = True
                    yield Listed()
                pause = min(max(ttl, _EVERY[0]), _EVERY[1])
            await anyio.sleep(pause)


@dataclass(frozen=True, slots=True)
class _Records:
    """The answer to one question: no records at all, or their texts and how long they hold."""

    values: tuple[str, ...] = ()
    ttl: float = _NOTHING_YET


class _Questions:
    """Asks name servers. If one of several questions has no answer, its last answer counts."""

    def __init__(self, name: DnsName, rank: int) -> None:
        self._name = name
        self._rank = rank
        self._resolver: dns.asyncresolver.Resolver | None = None
        self._last: dict[tuple[str, str], _Records] = {}
        self._too_high = False
        self._said: set[str] = set()  # targets without an answer, as far as that was logged

    async def sources(self) -> tuple[dict[str, Source | None], float]:
        """The sources by address, and after how many seconds to ask again.

        Raises:
            DiscoveryError: There is no answer.
        """
        resolver = self._resolver or await _resolver(self._name.server)
        self._resolver = None  # if this fails, the configuration of this host may have changed
        asked = _Round(resolver, self._last)
        sources, ttl = await self._sources(asked)
        self._last = asked.answers
        if asked.failed is not None and not asked.answered:
            raise asked.failed
        self._resolver = resolver
        return {source.address: source for source in sources[:MAX_KNOWN]}, ttl

    async def _sources(self, asked: _Round) -> tuple[list[Source], float]:
        name, base = self._name.of_rank(self._rank), self._name.port
        if base is not None:
            hosts = await self._hosts(asked, name)
            of_rank = self._name.port_of(base, self._rank)
            return [Source(Address(host, of_rank)) for host in hosts.values], hosts.ttl
        found = await asked.question(name, "SRV")
        services = [_Service.parse(value) for value in found.values[:MAX_KNOWN]]
        targets = {service.target: _Records() for service in services if service.target != "."}
        failed: dict[str, DiscoveryError] = {}
        free = anyio.CapacityLimiter(_AT_A_TIME)

        async def resolve(target: str) -> None:
            async with free:
                try:
                    targets[target] = await self._hosts(asked, target)
                except DiscoveryError as error:
                    failed[target] = error

        await _together([partial(resolve, target) for target in targets])
        sources = [
            Source(Address(host, port))
            for service in services
            if service.target in targets and (port := self._port(service.port)) is not None
            for host in targets[service.target].values
        ]
        if failed and not sources:
            raise next(iter(failed.values()))
        self._say(failed)
        return sources, min([found.ttl, *(hosts.ttl for hosts in targets.values())])

    def _say(self, failed: Mapping[str, DiscoveryError]) -> None:
        """Log each target that has no answer, once until it has one again. The others are found all the same."""
        for target in failed.keys() - self._said:
            _log.warning("netloader: a target of %s is left out: %s", self._name.name, failed[target])
        self._said = set(failed)

    def _port(self, base: int) -> int | None:
        port = self._name.port_of(base, self._rank)
        if 1 <= port <= _HIGHEST_PORT:
            return port
        if not self._too_high:
            self._too_high = True
            _log.warning("netloader: an SRV record of %s names port %d; it is left out", self._name.name, base)
        return None

    async def _hosts(self, asked: _Round, name: str) -> _Records:
        """The addresses of a host: those of the wanted family; without one, IPv4 if there is any, else IPv6."""
        kinds = {"4": ["A"], "6": ["AAAA"]}.get(self._name.family, ["A", "AAAA"])
        answers: dict[str, _Records | DiscoveryError] = {}

        async def ask(kind: str) -> None:
            try:
                answers[kind] = await asked.question(name, kind)
            except DiscoveryError as error:
                answers[kind] = error

        await _together([partial(ask, kind) for kind in kinds])
        found = [answer for kind in kinds if isinstance(answer := answers[kind], _Records) and answer.values]
        failed = [answer for answer in answers.values() if isinstance(answer, DiscoveryError)]
        if failed and not found:
            raise failed[0]
        if self._name.family != "any":
            found = found[:1]
        values = tuple(value for records in found for value in records.values)
        return _Records(values, min((records.ttl for records in found), default=_NOTHING_YET))


class _Round:
    """The questions that are asked together.

    Attributes:
        answers: By name and kind.
        answered: Whether any question was answered.
        failed: Why one was not.
    """

    def __init__(self, resolver: dns.asyncresolver.Resolver, last: Mapping[tuple[str, str], _Records]) -> None:
        self.answers: dict[tuple[str, str], _Records] = {}
        self.answered = False
        self.failed: DiscoveryError | None = None
        self._resolver = resolver
        self._last = last

    async def question(self, name: str, kind: str) -> _Records:
        """The answer to one question; without one, the last answer.

        Raises:
            DiscoveryError: There is none and was none.
        """
        records = _Records()
        try:
            answer = await self._resolver.resolve(name, kind, search=True, lifetime=_PATIENCE)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            self.answered = True
        except (dns.exception.DNSException, OSError) as error:
            hint = "check the name servers of this host, or the one that the URL names"
            self.failed = DiscoveryError(f"{kind} records of {name}: {one_line(str(error))}", hint=hint)
            if (name, kind) not in self._last:
                raise self.failed from error
            records = _Records(self._last[name, kind].values, _RETRY)
        else:
            self.answered = True
            records = _Records(tuple(map(str, answer))[:MAX_KNOWN], float(answer.chaining_result.minimum_ttl))
        self.answers[name, kind] = records
        return records


@dataclass(frozen=True, slots=True)
class _Service:
    """One SRV record. Its priority and weight are not looked at: the nearest and least busy server is tried first."""

    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        _, _, port, target = text.split()
        return cls(int(port), target)


async def _resolver(server: Address | None) -> dns.asyncresolver.Resolver:
    """A resolver with the configuration of this host, or for one name server.

    Raises:
        DiscoveryError: This host has no configuration that can be read.
    """
    if server is None:
        try:
            return await anyio.to_thread.run_sync(dns.asyncresolver.Resolver)
        except (dns.exception.DNSException, OSError) as error:
            hint = "name a server in the URL: ?server=IP:PORT"
            raise DiscoveryError(f"the configuration of name servers can't be read: {error}", hint=hint) from error
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [server.host], server.port
    return resolver


async def _together(calls: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Make calls at the same time. They raise nothing."""
    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(call)
