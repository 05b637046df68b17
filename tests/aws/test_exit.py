"""What becomes of notifications when their process ends: properly, without a word, by a signal, or in a fork."""

from __future__ import annotations

import os
import textwrap
from typing import Any

import pytest

import interpreter
from arrivals import Queue
from endpoint import Endpoint
from mongodb_session_manager import MongoDBSessionManagerFactory, create_metadata_sqs_hook
from support import alternating

UPDATES = 10

SLOW = 60.0
"""Seconds that a busy machine may take for what is bounded by five otherwise."""


def script(body: str) -> str:
    opening = f"""
        import logging, os, sys
        from mongodb_session_manager import *
        logging.basicConfig(level=logging.WARNING)
        uri, database, queue_url, endpoint_url = sys.argv[1:]
        hook = create_metadata_sqs_hook(queue_url, endpoint_url=endpoint_url)
        updates = {UPDATES}
    """
    return textwrap.dedent(opening) + textwrap.dedent(body)


def run(body: str, *arguments: str) -> tuple[str, str]:
    """Run a script to its end; return what it wrote."""
    return interpreter.run(script(body), *arguments, timeout=100)


@pytest.mark.parametrize("kind", alternating("manager", "factory"))
def test_close_right_after_many_updates_delivers_them_all(
    server: str, database: str, moto: str, queue: Queue, kind: str
) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    with MongoDBSessionManagerFactory(server, database) as factory:
        sessions = 1 if kind == "manager" else 5
        managers = [factory.create_session_manager(f"s {n}", metadata_hook=hook) for n in range(sessions)]
        for number in range(UPDATES):
            managers[number % sessions].update_metadata({"n": number})
        (managers[0] if kind == "manager" else factory).close(notification_timeout=SLOW)
        assert factory.get_notification_stats()["delivered"] == UPDATES
    assert sorted(message.metadata["n"] for message in queue.arrived()) == list(range(UPDATES))


@pytest.mark.anyio
async def test_close_of_an_async_manager_too(server: str, database: str, moto: str, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    async with MongoDBSessionManagerFactory(server, database) as factory:
        manager = await factory.create_session_manager_async("s", metadata_hook=hook)
        for number in range(UPDATES):
            await manager.update_metadata({"n": number})
        await manager.close(notification_timeout=SLOW)
    assert [message.metadata["n"] for message in queue.arrived()] == list(range(UPDATES))


@pytest.mark.parametrize(
    "opened", alternating("MongoDBSessionManager('s', uri, database", "factory.create_session_manager('s'")
)
def test_the_end_of_the_interpreter_delivers_them_too(
    server: str, database: str, stored: Any, moto: str, queue: Queue, opened: str
) -> None:
    body = f"""
        from mongodb_session_manager._io import loop as _loop
        _loop.EXIT_TIMEOUT = {SLOW}
        factory = MongoDBSessionManagerFactory(uri, database)
        manager = {opened}, metadata_hook=hook)
        for number in range(updates):
            manager.update_metadata({{"n": number}})
    """
    assert run(body, server, database, queue.url, moto) == ("", "")
    assert [message.metadata["n"] for message in queue.arrived()] == list(range(UPDATES))
    assert stored.find_one({"_id": "s"})["metadata"] == {"n": UPDATES - 1}


def test_the_end_of_the_interpreter_is_bounded_and_names_what_it_loses(
    server: str, database: str, stored: Any, endpoint: Endpoint, queue: Queue
) -> None:
    endpoint.hangs()
    body = """
        from mongodb_session_manager._io import loop as _loop
        _loop.EXIT_TIMEOUT = 1.0
        manager = MongoDBSessionManager("s", uri, database, metadata_hook=hook)
        for number in range(3):
            manager.update_metadata({"n": number})
    """
    _, errors = run(body, server, database, queue.url, endpoint.url)
    assert "undelivered=<'sqs.metadata_update x 3'>" in errors
    assert "Traceback" not in errors
    assert stored.find_one({"_id": "s"})["metadata"] == {"n": 2}


def test_a_gone_connection_is_removed_by_an_interpreter_that_ends(
    server: str, database: str, stored: Any, endpoint: Endpoint
) -> None:
    """Notifications are delivered before the connection to MongoDB is closed."""
    endpoint.answers((410, "GoneException", ""))
    body = """
        hook = create_metadata_websocket_hook(endpoint_url)
        manager = MongoDBSessionManager("s", uri, database, metadata_hook=hook)
        manager.update_metadata({"connection_id": "c-1", "n": 1})
    """
    assert run(body, server, database, "https://unused", endpoint.url) == ("", "")
    assert stored.find_one({"_id": "s"})["metadata"] == {"n": 1}


def test_a_killed_process_loses_notifications_and_no_data(
    server: str, database: str, stored: Any, endpoint: Endpoint, queue: Queue
) -> None:
    endpoint.hangs()
    body = """
        manager = MongoDBSessionManager("s", uri, database, metadata_hook=hook)
        for number in range(updates):
            manager.update_metadata({"n": number, f"key {number}": number})
        print("stored", flush=True)
        sys.stdin.read()
    """
    with interpreter.start(script(body), server, database, queue.url, endpoint.url) as process:
        assert process.stdout.readline() == "stored\n"
        process.kill()
    metadata = stored.find_one({"_id": "s"})["metadata"]
    assert metadata == {"n": UPDATES - 1, **{f"key {number}": number for number in range(UPDATES)}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_delivers_its_own_and_the_parent_its_own(
    server: str, database: str, moto: str, queue: Queue
) -> None:
    body = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of fork beside threads
        factory = MongoDBSessionManagerFactory(uri, database, metadata_hook=hook)
        with factory.create_session_manager("parent") as manager:
            manager.update_metadata({"by": "parent", "n": 1})
            child = os.fork()
            if not child:
                with factory.create_session_manager("child") as own:
                    own.update_metadata({"by": "child", "n": 1})
                assert factory.get_notification_stats()["delivered"] == 1
                sys.stdout.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            manager.update_metadata({"by": "parent", "n": 2})
    """
    run(body, server, database, queue.url, moto)
    arrived = [(message.metadata["by"], message.metadata["n"]) for message in queue.arrived()]
    assert sorted(arrived) == [("child", 1), ("parent", 1), ("parent", 2)]
