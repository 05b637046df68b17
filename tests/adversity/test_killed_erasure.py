"""A process is killed between any two commands of an erasure; the next erasure completes it."""

from __future__ import annotations

import os
from typing import Any

import pymongo
import pytest

from fix_erasure import ADA, SMALL, check_listed, fill_all, left, others
from killing import Child, Killer, kill_points, start
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import eventually

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

COUNT = 2
"""The number of sessions of each owner."""


def erased(server: str, database: str, owner: str, at: int | None, after: bool) -> Child:
    def work(killer: Killer, say: Any) -> None:
        with MongoDBSessionManagerFactory(server, database, event_listeners=[killer], **SMALL) as factory:
            factory.list_sessions()
            eventually(lambda: not factory._connection._tasks)  # what a process starts with
            killer.armed = True
            say("erased", factory.erase_owner(owner)["sessions"])
            killer.armed = False

    return start(work, at, after).wait()


@pytest.mark.timeout(900)
def test_a_process_is_killed_between_any_two_commands_of_an_erasure(
    server: str, driver: pymongo.MongoClient[dict[str, Any]], database: str, pytestconfig: pytest.Config
) -> None:
    stored = driver[database]
    fill_all(server, stored, {f"{ADA}-s{n}": ADA for n in range(COUNT)})
    with MongoDBSessionRepository(server, database, **SMALL) as repository:
        exports = [list(repository.export_session(f"{ADA}-s{n}")) for n in range(COUNT)]

    def prepare(owner: str) -> None:
        with MongoDBSessionRepository(server, database, **SMALL) as repository:
            for n, lines in enumerate(exports):
                renamed = (line.replace(f"{ADA}-s{n}", f"{owner}-{n}") for line in lines[:-1])
                end = lines[-1].partition(', "sha256"')[0] + "}}"
                repository.import_session([*renamed, end], f"{owner}-{n}", owner=owner)

    prepare("whole")
    whole = erased(server, database, "whole", None, False)
    assert sorted(*whole.has_said("erased")) == [f"whole-{n}" for n in range(COUNT)]
    assert left(stored, "whole") == {}
    points = kill_points(len(whole.commands), pytestconfig.getoption("--full-adversity"), most=2)
    for n, after in points:
        prepare(owner := f"killed-{n}-{after}.")
        of_others = others(stored, owner)
        child = erased(server, database, owner, n, after)
        assert child.killed
        with MongoDBSessionRepository(server, database, **SMALL) as repository:
            listed = check_listed(repository, owner)
            receipt = repository.erase_owner(owner)
        assert {*listed} <= {*receipt["sessions"]}
        assert left(stored, owner) == {}
        assert others(stored, owner) == of_others
