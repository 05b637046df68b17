"""The faults. Each fault is active while its context is open, and asserts at the end that it occurred."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from operations import Session
from sites import Site

from mongodb_session_manager import DatabaseTimeoutError
from proxy import command
from support import eventually

Fault = Callable[[Site, Session, str], AbstractContextManager[None]]

SHORT = {"serverSelectionTimeoutMS": 200}
IMPATIENT = {"serverSelectionTimeoutMS": 200, "socketTimeoutMS": 300, "connectTimeoutMS": 300}
OPTIONS: dict[str, dict[str, Any]] = {
    "refused": SHORT,
    "died": SHORT,
    "frozen": IMPATIENT,
    "mute": IMPATIENT,
    "pool": {"maxPoolSize": 1, "waitQueueTimeoutMS": 100},
}


@contextmanager
def refused(site: Site, session: Session, name: str) -> Iterator[None]:
    """The server refuses all connections."""
    site.proxy.refuse()
    yield
    assert session.error is not None
    assert "Connection refused" in str(session.error)
    site.proxy.accept()


@contextmanager
def dropped(site: Site, session: Session, name: str) -> Iterator[None]:
    """The connection is lost before the server gets the command, and again at the retry."""
    site.proxy.drop_before_request(command(name), 2)
    yield
    assert site.proxy.dropped == 2


@contextmanager
def unacked(site: Site, session: Session, name: str) -> Iterator[None]:
    """The connection is lost after the server has executed the command, and again at the retry."""
    site.proxy.drop_after_request(command(name), 2)
    yield
    assert site.proxy.dropped == 2


@contextmanager
def died(site: Site, session: Session, name: str) -> Iterator[None]:
    """The server executes the command, and then refuses all connections."""
    site.proxy.refuse_after_request(command(name))
    yield
    assert site.proxy.dropped == 1
    site.proxy.accept()


@contextmanager
def frozen(site: Site, session: Session, name: str) -> Iterator[None]:
    """The command and all later bytes are held back, and arrive after the caller has stopped waiting."""
    site.proxy.freeze_before_request(command(name))
    yield
    assert site.proxy.frozen == 1
    site.proxy.thaw()


@contextmanager
def mute(site: Site, session: Session, name: str) -> Iterator[None]:
    """The server executes the command; its reply and all later bytes are held back."""
    site.proxy.freeze_after_request(command(name))
    yield
    assert site.proxy.frozen == 1
    site.proxy.thaw()


@contextmanager
def failing(
    site: Site, session: Session, name: str, *, times: int, at_least: int | None = None, **data: Any
) -> Iterator[None]:
    before = site.fail(times, failCommands=[name], appName=session.session_id, **data)
    yield
    assert times >= site.fail(0) - before >= (at_least or times)


@contextmanager
def pool(site: Site, session: Session, name: str) -> Iterator[None]:
    """The only connection of the pool waits for the reply to another command."""
    site.proxy.freeze_before_request(b"\x10ping\0")
    other = threading.Thread(target=session.factory.ping)
    other.start()
    eventually(lambda: site.proxy.frozen)
    yield
    assert session.error is not None
    assert isinstance(session.error, DatabaseTimeoutError)
    assert "no free connection" in str(session.error)
    site.proxy.thaw()
    other.join(30)


NOT_PRIMARY: dict[str, Any] = {"errorCode": 10107}
WRITE_CONCERN: dict[str, Any] = {
    "writeConcernError": {
        "code": 64,
        "codeName": "WriteConcernTimeout",
        "errmsg": "waiting for replication timed out",
        "errInfo": {"wtimeout": True},
    }
}

FAULTS: dict[str, Fault] = {
    "refused": refused,
    "dropped": dropped,
    "unacked": unacked,
    "died": died,
    "frozen": frozen,
    "mute": mute,
    "demoted": partial(failing, times=2, **NOT_PRIMARY),
    "no-primary": partial(failing, times=1000, at_least=4, **NOT_PRIMARY),
    "write-concern": partial(failing, times=1, **WRITE_CONCERN),
    "pool": pool,
    "cancelled": frozen,
}
