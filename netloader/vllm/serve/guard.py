"""The one guard around all that is for serving only: it logs the error and refuses the model, and raises nothing.

An engine has to load, to reload, to sleep and to wake up; serving its weights to others is extra. An error of serving
(no memory, a lost server, a bug) therefore ends the serving and nothing else. That is safe, because a model that is not
offered cannot be a wrong one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from netloader.core.identity import Role
from netloader.errors import NetloaderError
from netloader.vllm.serve.serving import ROLES, WorkerServer

__all__ = ["HINT", "described", "failure_told", "refuse", "serving_only"]

log = logging.getLogger(__name__)

HINT = "the log of this source has the details; pull from another one"


@contextmanager
def serving_only(what: str, server: WorkerServer | None, roles: Sequence[Role] = ROLES) -> Iterator[None]:
    """Run what is for serving only: an error is logged with its traceback, and clients are refused with the reason.

    Only what ends the process or the thread is raised. A server that cannot even refuse is given up.

    Args:
        what: What is being done, for the log and for clients ("recording the weights").
        server: Whose clients are refused; None where there are none.
        roles: The models that are not served because of it.
    """
    try:
        yield
    except Exception as error:
        log.exception("netloader: %s failed, which costs what is served and nothing else", what)
        refuse(server, roles, f"{what} failed: {described(error)}", HINT)


@contextmanager
def failure_told(server: WorkerServer | None, role: Role) -> Iterator[None]:
    """Run a load: an error that ends it goes on, after clients that wait for the model have been told."""
    try:
        yield
    except BaseException as error:
        refuse(server, [role], f"the model could not be loaded: {error}", "pull from another source")
        raise


def refuse(server: WorkerServer | None, roles: Sequence[Role], reason: str, hint: str) -> None:
    """Tell clients why these models can't be pulled; raises nothing."""
    if server is None or not server.running:
        return
    try:
        for role in roles:
            server.refuse(role, reason, hint)
    except Exception:
        log.exception("netloader: the server of this process can't be told to refuse, and is ended")
        server.give_up()


def described(error: Exception) -> str:
    """An error in words; the type is named unless the error is one of netloader's."""
    return str(error) if isinstance(error, NetloaderError) else f"{type(error).__name__}: {error}"
