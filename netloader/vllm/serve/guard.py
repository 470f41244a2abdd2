"""The one guard around all code that is for serving only: it logs an error, refuses the model, and raises nothing.

An engine has to load, to reload, to sleep and to wake up. Serving its weights to others is optional. So an error of
serving (no memory, a lost server, a bug) ends the serving and nothing else. That is safe, because a model that is not
offered cannot be a wrong one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from netloader.core.identity import Role
from netloader.errors import NetloaderError
from netloader.vllm.serve.serving import ROLES, WorkerServer

__all__ = ["HINT", "error_text", "refuse", "refuse_on_failure", "serving_only"]

log = logging.getLogger(__name__)

HINT = "the log of this source has the details; pull from another one"


@contextmanager
def serving_only(what: str, server: WorkerServer | None, roles: Sequence[Role] = ROLES) -> Iterator[None]:
    """Run code that is for serving only. An error is logged with its traceback, and clients are told the reason.

    Only exceptions that end the process or the thread are raised. If the server can't even refuse, it is ended.

    Args:
        what: What the code does, for the log and for clients ("recording the weights").
        server: The server whose clients are refused; None if there is none.
        roles: The models that are not served after an error.
    """
    try:
        yield
    except Exception as error:
        log.exception("netloader: %s failed, which costs what is served and nothing else", what)
        refuse(server, roles, f"{what} failed: {error_text(error)}", HINT)


@contextmanager
def refuse_on_failure(server: WorkerServer | None, role: Role) -> Iterator[None]:
    """Run a load. If an error ends it, clients that wait for the model are refused first; then the error is raised."""
    try:
        yield
    except BaseException as error:
        refuse(server, [role], f"the model could not be loaded: {error}", "pull from another source")
        raise


def refuse(server: WorkerServer | None, roles: Sequence[Role], reason: str, hint: str) -> None:
    """Tell clients why these models can't be pulled. Raises nothing."""
    if server is None or not server.running:
        return
    try:
        for role in roles:
            server.refuse(role, reason, hint)
    except Exception:
        log.exception("netloader: the server of this process can't be told to refuse, and is ended")
        server.give_up()


def error_text(error: Exception) -> str:
    """The text of an error, with its type unless it is one of netloader's."""
    return str(error) if isinstance(error, NetloaderError) else f"{type(error).__name__}: {error}"
