"""Every fault while old messages move into the archive: no caller gets an error, nothing is lost, the move completes.

`EXPECTED` is the state of the move during the fault, by the command at which the fault occurs:

    moved    the messages are in the archive
    kept     they are in the session's document, and are moved after the next append
"""

from __future__ import annotations

import uuid
from contextlib import closing

import pytest
from faults import FAULTS, OPTIONS
from leaks import nothing_left
from operations import Api, Async, Session, Sync, message
from sites import Site, answers

from mongodb_session_manager import MongoDBSessionManagerFactory
from proxy import command
from support import agent, alternating, eventually, texts

EXPECTED = """
              dropped unacked died  frozen mute  demoted no-primary write-concern
aggregate     moved   moved   kept  kept   kept  moved   kept       kept
findAndModify moved   moved   moved kept   moved moved   kept       moved
"""

HEADER, *ROWS = (line.split() for line in EXPECTED.strip().splitlines())
CELLS = [
    pytest.param(
        *(name, fault, expected, api),
        marks=pytest.mark.full_adversity if (column // 2 + row + turn) % 2 else pytest.mark.half((column + row) % 2),
    )
    for row, (name, *cells) in enumerate(ROWS)
    for column, (fault, expected) in enumerate(zip(HEADER, cells, strict=True))
    for turn, api in enumerate((Sync, Async))
]
"""Each run has every fault, at the one command or at the other, and both managers."""


async def append(session: Session, text: str) -> None:
    session.manager.append_message(message(text), session.agent)
    if session.api.name == "sync":
        session.manager.flush()
    else:
        await session.manager.flush()


def archived(session: Session) -> int:
    document = session.document
    assert document is not None
    position: int = document["agents"]["agent"].get("archived", 0)
    return position


def is_moving(factory: MongoDBSessionManagerFactory) -> bool:
    return bool(factory._connection._tasks)


def everything(factory: MongoDBSessionManagerFactory, session_id: str) -> list[str]:
    listed = factory._portal.call(factory._async.list_messages, session_id, "agent")
    assert [one.message_id for one in listed] == list(range(len(listed)))
    return texts([one.to_message() for one in listed])


@pytest.mark.parametrize(("name", "fault", "expected", "api"), CELLS, ids=lambda value: getattr(value, "name", value))
def test_a_move_meets_a_fault(name: str, fault: str, expected: str, api: type[Api], replica_set_site: Site) -> None:
    check(name, fault, expected, api(), replica_set_site)


@pytest.mark.parametrize("name", alternating("aggregate", "findAndModify"))
@pytest.mark.parametrize("fault", alternating("dropped", "unacked"))
def test_a_move_meets_a_fault_on_a_standalone_server(name: str, fault: str, standalone_site: Site) -> None:
    check(name, fault, "moved", Sync(), standalone_site)


def check(name: str, fault: str, expected: str, api: Api, site: Site) -> None:
    session_id = f"s-{uuid.uuid4().hex}"
    options = {"appName": session_id, **OPTIONS.get(fault, {})}
    site.proxy.reset()
    with (
        nothing_left(site.proxy),
        closing(api),
        MongoDBSessionManagerFactory(site.proxy.uri, site.database, max_embedded_messages=2, **options) as factory,
    ):
        eventually(lambda: answers(factory))
        site.copy_template(session_id)
        session = Session(session_id, api, factory, lambda kind: None, site.collection)
        api.run(session.open())
        session.agent = agent(session.manager)
        with FAULTS[fault](site, session, name):
            api.run(append(session, "third"))
            eventually(lambda: not is_moving(factory))
            assert archived(session) == {"moved": 2, "kept": 0}[expected]
        eventually(lambda: answers(factory))
        assert everything(factory, session_id) == ["hi", "hello", "third"]
        api.run(append(session, "fourth"))
        api.run(append(session, "fifth"))
        eventually(lambda: archived(session) >= 2 and not is_moving(factory))
        assert everything(factory, session_id) == ["hi", "hello", "third", "fourth", "fifth"]
        api.run(session.close())
        assert api.tasks() == set()


@pytest.mark.parametrize("name", ["aggregate", "findAndModify"])
def test_closing_waits_for_a_move(name: str, replica_set_site: Site) -> None:
    site, session_id = replica_set_site, f"s-{uuid.uuid4().hex}"
    site.proxy.reset()
    site.copy_template(session_id)
    with MongoDBSessionManagerFactory(site.proxy.uri, site.database, max_embedded_messages=2) as factory:
        session = Session(session_id, Sync(), factory, lambda kind: None, site.collection)
        session.api.run(session.open())
        session.agent = agent(session.manager)
        site.proxy.freeze_before_request(command(name))
        session.api.run(append(session, "third"))
        eventually(lambda: site.proxy.frozen)
        assert archived(session) == 0
        site.proxy.thaw()
    assert archived(session) == 2
