"""Every operation during every fault: stored exactly once or a clear error; the session stays usable, nothing leaks.

`EXPECTED` contains the outcome of each operation, cell by cell:

    ok       it succeeds, and is stored once
    down     DatabaseUnavailableError, not stored
    down?    DatabaseUnavailableError with an unknown outcome; not stored while the fault lasts
    down!    DatabaseUnavailableError with an unknown outcome; stored
    down+    as `down!`, but the error is that of a retry, which does not know that the first attempt was stored
    slow, slow?, slow!    the same with DatabaseTimeoutError
    x/y      with the synchronous manager / with the asynchronous manager, whose flush repeats earlier statements
    -        cannot happen
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from faults import FAULTS, IMPATIENT, OPTIONS
from leaks import nothing_left
from operations import OPERATIONS, Api, Async, Operation, Session, Sync
from sites import Site, answers

from mongodb_session_manager import DatabaseTimeoutError, DatabaseUnavailableError, MongoDBSessionManagerFactory
from proxy import command
from support import CommandLog, agent, eventually, run_random, sampled, texts

EXPECTED = """
           refused dropped unacked died        frozen mute  demoted no-primary write-concern pool cancelled
open       down    ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
append     down    ok      ok      down!/down+ slow?  slow! ok      down       slow!/ok      slow ok
turn       down    ok      ok      down+       slow?  slow! ok      down       slow!         slow ok
sync       down    ok      ok      down!/down+ slow?  slow! ok      down       slow!/ok      slow ok
metadata   down    ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
feedback   down    ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
redaction  down    ok      ok      down!/down+ slow?  slow! ok      down       slow!/ok      slow ok
close      down    ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
close-own  down    ok      ok      down!       slow?  slow! ok      down       slow!         -    ok
lease-open down    ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
lease-turn down    ok      ok      down+       slow?  slow! ok      down       slow!         slow ok
lease-close down   ok      ok      down!       slow?  slow! ok      down       slow!         slow ok
overlap    down    ok      ok      down+       slow?  slow! ok      down       ok            slow -
"""

ERRORS = {"down": DatabaseUnavailableError, "slow": DatabaseTimeoutError}

RETRIES_OF_THE_DRIVER = ("dropped", "unacked")
"""Faults after which the driver retries on a replica set, but not on a standalone server."""


@dataclass(frozen=True)
class Cell:
    operation: str
    fault: str
    outcome: str

    def expected(self, api: Api) -> str:
        """Return the outcome with one kind of manager."""
        sync, _, asynchronous = self.outcome.partition("/")
        return asynchronous or sync if api.name == "async" else sync

    def __str__(self) -> str:
        return f"{self.operation}-{self.fault}"


def cells() -> list[Cell]:
    header, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    return [
        Cell(operation, fault, expected)
        for operation, *row in rows
        for fault, expected in zip(header, row, strict=True)
        if expected != "-"
    ]


# A cell.


def drawn(*faults: str) -> list[Any]:
    """Return cells with alternating kinds of manager; with both kinds where they differ, and for `append`.

    Each run draws a quarter of the cells, with every operation and every fault. `--full-adversity` returns all cells
    with both kinds.
    """
    random, share = run_random(), min(4, len(faults))
    rows = random.sample(list(OPERATIONS), len(OPERATIONS))
    columns = random.sample(faults, len(faults))
    cases, chosen, turns = [], [], 0
    for cell in (cell for cell in cells() if cell.fault in faults):
        cases += [(cell, Sync), (cell, Async)]
        if (rows.index(cell.operation) + columns.index(cell.fault)) % share == 0:
            both = cell.operation == "append" or "/" in cell.outcome
            chosen += cases[-2:] if both else [cases[turns % 2 - 2]]
            turns += 1
    return sampled(cases, *chosen)


def shown(value: Cell | type[Api]) -> str:
    return str(value) if isinstance(value, Cell) else value.name


@pytest.mark.parametrize(("cell", "api"), drawn(*FAULTS), ids=shown)
def test_on_a_replica_set(cell: Cell, api: type[Api], replica_set_site: Site) -> None:
    check(cell, api(), replica_set_site)


@pytest.mark.parametrize(("cell", "api"), drawn(*RETRIES_OF_THE_DRIVER), ids=shown)
def test_on_a_standalone_server(cell: Cell, api: type[Api], standalone_site: Site) -> None:
    check(cell, api(), standalone_site)


def check(cell: Cell, api: Api, site: Site) -> None:
    session_id = f"s-{uuid.uuid4().hex}"
    options = {"appName": session_id, **OPTIONS.get(cell.fault, {})}
    site.proxy.reset()
    with (
        nothing_left(site.proxy),
        closing(api),
        MongoDBSessionManagerFactory(site.proxy.uri, site.database, **options) as factory,
    ):
        eventually(lambda: answers(factory))
        operation = OPERATIONS[cell.operation]
        own = partial(make_own, session_id, site, options)
        session = Session(session_id, api, factory, own, site.collection, options=operation.options)
        if operation.act is not OPERATIONS["open"].act:
            site.copy_template(session_id)
            api.run(session.open_owning() if cell.operation == "close-own" else session.open())
            session.agent = agent(session.manager)
            assert texts(session.agent.messages) == session.conversation == ["hi", "hello"]
        with FAULTS[cell.fault](site, session, operation.command):
            if cell.fault == "cancelled":
                cancel(session, operation, site)
            else:
                meet(session, operation, cell.expected(api))
        eventually(lambda: answers(factory))
        go_on(session, operation, cell)
        api.run(session.close())
        assert api.tasks() == set()


def make_own(session_id: str, site: Site, options: dict[str, Any], kind: Callable[..., Any]) -> Any:
    return kind(session_id, site.proxy.uri, site.database, **options)


def count(session: Session, operation: Operation) -> int:
    """Return how often the effect of the operation is stored."""
    document = session.document
    return 0 if document is None else operation.count(document)


def meet(session: Session, operation: Operation, expected: str) -> None:
    """Run the operation during the fault."""
    if expected == "ok":
        session.api.run(operation.act(session))
        assert count(session, operation) == 1
        return
    with pytest.raises(ERRORS[expected[:4]]) as raised:
        session.api.run(operation.act(session))
    session.error = raised.value
    assert count(session, operation) == (expected[-1] in "!+")
    if expected[-1] in "?!":
        assert "unknown whether" in str(raised.value)


def cancel(session: Session, operation: Operation, site: Site) -> None:
    """Cancel the caller of the operation while its command is in flight; the command is still executed."""

    def lift() -> None:
        assert count(session, operation) == 0
        site.proxy.thaw()

    session.api.interrupt(operation.act(session), lambda: site.proxy.frozen > 0, lift, lingers=operation.lingers)
    eventually(lambda: count(session, operation) == 1)


def go_on(session: Session, operation: Operation, cell: Cell) -> None:
    """Check that a failed operation is stored once, now or after repeating it, and run one more turn."""
    run = session.api.run
    expected = cell.expected(session.api)
    done = expected == "ok"
    lost = expected[-1] not in "k?!+"
    conversation = list(operation.conversation)
    if cell.operation in ("turn", "lease-turn") and not (
        done and (cell.fault != "cancelled" or session.api.name == "sync")
    ):
        conversation.remove("answer")  # the model was not called
    if not done and operation.recorded:
        run(session.flush())  # meanwhile, a command that was held back arrives late
    elif expected.endswith("?"):
        eventually(lambda: count(session, operation) == 1)
    if (not done and not operation.recorded and operation.repeatable) or (lost and cell.operation == "feedback"):
        run(operation.act(session))
    if lost and cell.operation == "close-own":
        assert count(session, operation) == 0
        conversation.remove("op")
    else:
        assert count(session, operation) == 1
    if operation.act is OPERATIONS["open"].act and session.manager is None:
        run(session.open())
    if operation.act is OPERATIONS["close"].act:
        run(session.close())
        run(session.open())
        session.agent = None
    run(session.ask("next", "fine"))
    assert session.conversation == [*conversation, "next", "fine"]
    assert session.collection.count_documents({"_id": session.session_id}) == 1
    run(session.close())
    run(session.open())
    assert texts(agent(session.manager).messages) == [*conversation, "next", "fine"]


def test_what_was_waited_for_as_long_as_allowed_is_not_sent_again(standalone_site: Site) -> None:
    site, session_id, commands = standalone_site, f"s-{uuid.uuid4().hex}", CommandLog()
    site.proxy.reset()
    site.copy_template(session_id)
    with MongoDBSessionManagerFactory(
        site.proxy.uri, site.database, event_listeners=[commands], **IMPATIENT
    ) as factory:
        manager = factory.create_session_manager(session_id)
        site.proxy.freeze_after_request(command("update"))
        with pytest.raises(DatabaseTimeoutError, match="unknown whether"):
            manager.add_feedback({"rating": "up"})
        assert commands.names.count("update") == 1
        site.proxy.thaw()
