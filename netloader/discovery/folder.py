"""``dir:PATH``: servers write files into a folder that clients can read, such as one on a shared file system.

Two kinds of files are read: address files (the text ``IP:Port``), as OUTPUT_PREFIX writes them, and entries (JSON), as
this module writes them. There are no leases: the file of a server that died stays, and a pull finds nobody there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import msgspec

from netloader.core.addresses import Address, parse_address
from netloader.core.entries import MAX_ENTRY_BYTES, Entry, decode_entry
from netloader.core.sources import MAX_KNOWN, Source
from netloader.core.texts import LINE, one_line
from netloader.discovery.address_file import AddressFile, AddressFileError
from netloader.discovery.base import Listed, Publication, SourceChange, Wanted
from netloader.discovery.beside import beside
from netloader.discovery.off_loop import OffLoop
from netloader.discovery.outage import Outage
from netloader.discovery.publishing import Updates
from netloader.discovery.told import Told
from netloader.errors import ConfigError, DiscoveryError, LocalProtocolError

__all__ = ["Folder", "open_folder"]

_EVERY = 1.0
"""Seconds between two looks at the folder."""

_UPDATE = 5.0
"""Least seconds between two writes of one entry: file systems that are shared are slow."""

_PATIENCE = 5.0
"""Seconds that a file system may take."""

_MOST_FILES = 65_536
"""Most files that are listed; of them, MAX_KNOWN are read."""

_ENTRY_FILE = re.compile(r"netloader-(?P<rank>[0-9]{1,9})-[0-9a-f]{32}\.json")
_ADDRESS_FILE = re.compile(r"(?:.*[^0-9])?(?P<rank>[0-9]{1,9})?\.txt", re.DOTALL)

_log = logging.getLogger("netloader")


def open_folder(url: str) -> Folder:
    """The backend of ``dir:PATH``.

    Raises:
        ConfigError: There is no path.
    """
    path = url.partition(":")[2]
    if not path.startswith("/") or "\0" in path:
        allowed = "dir:PATH with an absolute path: a folder, or the beginning of paths of files, as OUTPUT_PREFIX is"
        raise ConfigError(field="path", value=path, allowed=allowed, reason="the path is not absolute")
    return Folder(path)


class Folder:
    """Finds and publishes servers by files. A `Backend` that can't claim.

    Args:
        path: A folder, or the beginning of the paths of files.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def sources(self, wanted: Wanted) -> FolderSources:
        """See :meth:`netloader.discovery.Backend.sources`."""
        return FolderSources(self._path, wanted)

    def publisher(self) -> FolderPublisher:
        """See :meth:`netloader.discovery.Backend.publisher`."""
        return FolderPublisher(self._path)

    def claims(self) -> None:
        """Nothing: files do not expire when their writer dies."""
        return


class FolderSources:
    """The servers whose files are in a folder. A `SourceProvider`.

    Args:
        path: A folder, or the beginning of the paths of files.
        wanted: Which servers. An address file says nothing of key and role, and its name ends with the rank, if it has
            any.
    """

    def __init__(self, path: str, wanted: Wanted) -> None:
        self._path = path
        self._wanted = wanted

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`. It ends when it is closed only, and raises nothing."""
        reader = _Reader(self._path, self._wanted)
        off_loop, outage = OffLoop(_PATIENCE, self._path), Outage(f"finding sources in {self._path}")
        told, listed = Told(missing=0.0), False
        while True:
            try:
                found = await off_loop.run(reader.read)
            except (DiscoveryError, OSError) as error:
                outage.failed(_named(error))
            else:
                outage.over()
                for change in told.changes(found, anyio.current_time()):
                    yield change
                if not listed:
                    listed = True
                    yield Listed()
            await anyio.sleep(_EVERY)


@dataclass(frozen=True, slots=True)
class _File:
    """What one file says; `look` tells whether it has changed."""

    look: tuple[int, int, int]
    entry: Entry | None = None
    source: Source | None = None


class _Reader:
    """Reads a folder, in a worker thread. A file that has not changed is not read again."""

    def __init__(self, path: str, wanted: Wanted) -> None:
        self._path = path
        self._wanted = wanted
        self._files: dict[str, _File] = {}
        self._said: set[str] = set()

    def read(self) -> dict[str, Source | None]:
        """The sources by address.

        Raises:
            OSError: The folder can't be read.
        """
        folder, begin = _split(self._path)
        names = []
        with os.scandir(folder) as files:
            for number, file in enumerate(files):
                if number >= _MOST_FILES:
                    self._say_once("more", f"there are more than {_MOST_FILES} files; the others are left out")
                    break
                if file.name.startswith(begin) and self._may_be_wanted(file.name[len(begin) :]):
                    names.append(file.name)
        if len(names) > MAX_KNOWN:
            self._say_once("many", f"there are more than {MAX_KNOWN} servers; the others are left out")
        self._files = {name: found for name in sorted(names)[:MAX_KNOWN] if (found := self._file(folder, name))}
        return self._sources()

    def _may_be_wanted(self, name: str) -> bool:
        found = _ENTRY_FILE.fullmatch(name) or _ADDRESS_FILE.fullmatch(name)
        if found is None or name.startswith("."):  # a file that is being written begins with a dot
            return False
        return found["rank"] is None or int(found["rank"]) == self._wanted.rank

    def _sources(self) -> dict[str, Source | None]:
        found: dict[str, Source | None] = {}
        others: set[str] = set()
        for file in self._files.values():
            if file.entry is None or file.source is None:
                continue
            entry, wanted = file.entry, self._wanted
            if (entry.key, entry.rank, entry.role) == (wanted.key, wanted.rank, wanted.role):
                found[file.source.address] = file.source
            else:
                others.add(file.source.address)
        for file in self._files.values():
            # An address file says less than an entry of the same server.
            if file.entry is None and file.source is not None and file.source.address not in others:
                found.setdefault(file.source.address, file.source)
        return found

    def _file(self, folder: Path, name: str) -> _File | None:
        try:
            # O_NONBLOCK: a pipe must not make this thread wait for a writer.
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # removed meanwhile
                self._say_once(name, f"{name} can't be read: {error.strerror}")
            return None
        try:
            status = os.fstat(descriptor)
            look = status.st_ino, status.st_mtime_ns, status.st_size
            known = self._files.get(name)
            if known is not None and known.look == look:
                return known
            if not stat.S_ISREG(status.st_mode):
                self._say_once(name, f"{name} is no file")
                return None
            return self._decoded(name, os.read(descriptor, MAX_ENTRY_BYTES + 1), look)
        finally:
            os.close(descriptor)

    def _decoded(self, name: str, text: bytes, look: tuple[int, int, int]) -> _File:
        try:
            if name.endswith(".json"):
                entry = decode_entry(text)
                return _File(look, entry, entry.source())
            return _File(look, None, Source(_address(text)))
        except Exception as error:  # noqa: BLE001 - no file of a stranger may hide the others
            self._say_once(name, f"{name} is left out: {str(error) or type(error).__name__}")
            return _File(look)

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said and len(self._said) < MAX_KNOWN:
            self._said.add(what)
            _log.warning("netloader: finding sources in %s: %s", self._path, one_line(text, LINE))


class FolderPublisher:
    """Publishes servers as files. A `Publisher`. A server that dies leaves its file, because there are no leases.

    Args:
        path: A folder, or the beginning of the paths of files.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._mine: set[Path] = set()

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        """See :meth:`netloader.discovery.Publisher.publish`."""
        return self._publish(entry)

    @asynccontextmanager
    async def _publish(self, entry: Entry) -> AsyncIterator[Publication]:
        # Folder or prefix is decided where files are touched. The name is the same for a server that restarts.
        name = _file_name(entry)
        outage = Outage(f"publishing {entry.address} in {self._path}")
        off_loop = OffLoop(_PATIENCE, self._path)
        written = _WrittenFile(self._path, name)

        async def send(encoded: bytes) -> None:
            try:
                await off_loop.run(partial(written.write, encoded))
            except (AddressFileError, OSError) as error:
                raise _named(error) from error

        updates = Updates(entry, send, outage, renew=float("inf"), retry=_EVERY, every=_UPDATE)
        if name in self._mine:
            raise LocalProtocolError(f"{entry.address} is published already")
        self._mine.add(name)
        try:
            try:
                await updates.send()
                async with beside(updates.run, f"netloader-publish-{entry.address}"):
                    yield updates
            finally:
                with anyio.move_on_after(_PATIENCE, shield=True):
                    try:
                        await off_loop.run(written.remove)
                    except DiscoveryError as error:
                        _log.warning("netloader: %s stays: %s", written, error)
        finally:
            self._mine.discard(name)


class _WrittenFile:
    """The file of one server; its methods run in a worker thread."""

    def __init__(self, path: str, name: Path) -> None:
        self._path = path
        self._name = name
        self._file: AddressFile | None = None

    def __str__(self) -> str:
        return f"{self._path} ({self._name})"

    def write(self, encoded: bytes) -> None:
        if self._file is None:
            folder, begin = _split(self._path)
            self._file = AddressFile(folder / f"{begin}{self._name}", hint="the folder must exist and be writable")
        self._file.write(json.dumps(msgspec.json.decode(encoded)))  # ASCII only

    def remove(self) -> None:
        if self._file is not None:
            self._file.remove()


def _split(path: str) -> tuple[Path, str]:
    """The folder, and how the names of its files begin."""
    if path.endswith("/") or Path(path).is_dir():
        return Path(path), ""
    return Path(path).parent, Path(path).name


def _file_name(entry: Entry) -> Path:
    which = f"{entry.key}\n{entry.role}\n{parse_address(entry.address, field='address of the entry')}"
    return Path(f"netloader-{entry.rank}-{hashlib.sha256(which.encode()).hexdigest()[:32]}.json")


def _address(text: bytes) -> Address:
    return parse_address(text[:MAX_ENTRY_BYTES].decode("utf-8", "replace").strip())


def _named(error: Exception) -> DiscoveryError:
    if isinstance(error, DiscoveryError):
        return error
    if isinstance(error, AddressFileError):
        return DiscoveryError(error.message, hint=error.hint)
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return DiscoveryError(f"the folder can't be read: {why}", hint="check the path, and that this process may read it")
