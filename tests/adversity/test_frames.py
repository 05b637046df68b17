"""Connections that are lost after any byte of a message, and slow connections."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import message
from sites import Site
from strands import Agent

from mongodb_session_manager import DatabaseTimeoutError, MongoDBSessionManager, MongoDBSessionManagerFactory
from proxy import command
from support import agent, eventually, message_ids, texts


@dataclass
class Line:
    """A server behind a proxy, and a factory that stays connected unless the proxy disconnects it."""

    site: Site
    factory: MongoDBSessionManagerFactory


@pytest.fixture(scope="module", params=["replica_set_site", "standalone_site"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    site = request.getfixturevalue(request.param)
    with MongoDBSessionManagerFactory(site.proxy.uri, site.database) as factory:
        yield Line(site, factory)


Act = Callable[[MongoDBSessionManager, Agent, int], object]

OPERATIONS: dict[str, tuple[Act, str]] = {
    "append": (lambda manager, asked, n: manager.append_message(message(f"op {n}"), asked), "update"),
    "metadata": (lambda manager, _, n: manager.update_metadata({"n": n}), "update"),
    "feedback": (lambda manager, _, n: manager.add_feedback({"n": n}), "update"),
    "read": (lambda manager, _, n: manager.get_metadata(), "find"),
}
"""What is done with a session for the nth time, and the command that it sends."""

HEADER = [0, 1, 3, 4, 8, 12, 15, 16, 17, 20, 21, 25, -1, -2, -5]


@pytest.mark.parametrize("way", ["request", "reply"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_connection_cut_within_a_message(line: Line, name: str, way: str) -> None:
    session_id = f"s-{uuid.uuid4().hex}"
    act, sent = OPERATIONS[name]
    line.site.copy_template(session_id)
    manager = line.factory.create_session_manager(session_id)
    asked = agent(manager)
    done = 0

    @settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(kept=st.sampled_from(HEADER) | st.integers(-400, 400))
    def cut_and_act(kept: int) -> None:
        nonlocal done
        line.site.proxy.reset()
        cut = line.site.proxy.cut_request if way == "request" else line.site.proxy.cut_reply
        cut(command(sent), kept)
        act(manager, asked, done)
        done += 1
        assert line.site.proxy.dropped == 1
        document: Any = line.site.collection.find_one({"_id": session_id})
        conversation = ["hi", "hello", *[f"op {number}" for number in range(done) if name == "append"]]
        assert texts(document["agents"]["agent"]["messages"]) == conversation
        assert message_ids(document) == list(range(len(conversation)))
        assert document["metadata"] == ({"n": done - 1} if name == "metadata" else {})
        assert [each["n"] for each in document["feedbacks"]] == [*range(done)] * (name == "feedback")

    cut_and_act()
    manager.close()


@pytest.mark.parametrize("way", ["request", "reply"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kept=st.sampled_from(HEADER) | st.integers(-3000, 3000))
def test_a_connection_cut_within_the_opening_of_a_session(line: Line, way: str, kept: int) -> None:
    session_id = f"s-{uuid.uuid4().hex}"
    line.site.copy_template(session_id)
    line.site.proxy.reset()
    cut = line.site.proxy.cut_request if way == "request" else line.site.proxy.cut_reply
    cut(command("findAndModify"), kept)
    manager = line.factory.create_session_manager(session_id)
    assert line.site.proxy.dropped == 1
    assert texts(agent(manager).messages) == ["hi", "hello"]
    manager.close()


def test_a_large_message_over_a_slow_line(replica_set_site: Site) -> None:
    site, session_id = replica_set_site, f"s-{uuid.uuid4().hex}"
    site.proxy.reset()
    site.copy_template(session_id)
    large = "a" * 400_000
    with MongoDBSessionManagerFactory(
        site.proxy.uri, site.database, max_embedded_bytes=2**20, socketTimeoutMS=1000, connectTimeoutMS=1000
    ) as factory:
        manager = factory.create_session_manager(session_id)
        asked = agent(manager)
        site.proxy.bytes_per_second = 4_000_000
        manager.append_message(message(large), asked)
        site.proxy.bytes_per_second = 50_000  # takes 8 seconds
        with pytest.raises(DatabaseTimeoutError, match="unknown whether"):
            manager.append_message(message(large + "b"), asked)
        assert stored(site, session_id) == ["hi", "hello", large]
        site.proxy.bytes_per_second = None
        eventually(lambda: factory.get_connection_stats()["status"] == "connected")
        manager.flush()
        manager.append_message(message("end"), asked)
        assert stored(site, session_id) == ["hi", "hello", large, large + "b", "end"]
        manager.close()


def stored(site: Site, session_id: str) -> list[str]:
    document = site.collection.find_one({"_id": session_id})
    assert document is not None
    assert message_ids(document) == list(range(len(document["agents"]["agent"]["messages"])))
    return texts(document["agents"]["agent"]["messages"])
