"""Pages of a conversation from its end: which messages they hold, and what they cost, wherever they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pymongo import monitoring

from fix_finding import START, Stored, cost, session
from mongodb_session_manager import (
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from support import agent, alternating, texts

pytestmark = pytest.mark.anyio


class Reads(monitoring.CommandListener):
    """The queries that were sent."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name == "find":
            kept = ("find", "filter", "projection", "sort", "limit")
            self.commands.append({name: value for name, value in event.command.items() if name in kept})

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture(scope="module")
def reads() -> Reads:
    return Reads()


@pytest.fixture(scope="module")
def repository_options(reads: Reads) -> dict[str, Any]:
    return {"event_listeners": [reads]}


def element(message_id: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [{"text": f"m{message_id}"}]}
    stored = {"message": message, "message_id": message_id, "redact_message": None}
    return {**stored, "created_at": START, "updated_at": START}


def store(stored: Stored, ids: list[int], buckets: list[int], following: int | None = None) -> None:
    """Store an agent with messages of these ids; `buckets` are the numbers of messages of the archived buckets."""
    incarnation, position = ObjectId(), 0
    archive = stored.database["agent_sessions_archive"]
    stored.delete_many({})
    archive.delete_many({})
    for count in buckets:
        archive.insert_one(
            {
                "_id": {"incarnation": incarnation, "agent": "a", "first": position},
                "session_id": "s",
                "revision": 0,
                "last": position + count - 1,
                "messages": list(map(element, ids[position : position + count])),
            }
        )
        position += count
    data = {
        "agent_data": {"agent_id": "a"},
        "created_at": START,
        "updated_at": START,
        "next_message_id": (ids[-1] + 1 if ids else 0) if following is None else following,
        "messages": list(map(element, ids[position:])),
        **({"archived": position} if position else {}),
    }
    stored.insert_one(session("s", incarnation=incarnation, agents={"a": data}))


def page(messages: list[int], limit: int | None, offset: int, newest_first: bool, before: int | None) -> list[int]:
    """What a page holds, by the words of the documentation."""
    shown = [each for each in messages if before is None or each < before]
    if newest_first:
        shown.reverse()
    return shown[offset:] if limit is None else shown[offset : offset + limit]


def test_any_page_of_any_conversation(repository: MongoDBSessionRepository, stored: Stored) -> None:
    """Whether or not the ids have gaps, as versions before 1.0 have left them, and whatever is in the archive."""
    gaps = st.lists(st.integers(1, 3), max_size=14)
    buckets = st.lists(st.integers(1, 5), max_size=4)
    arguments = st.tuples(
        st.none() | st.integers(0, 6), st.integers(0, 6), st.booleans(), st.none() | st.integers(0, 45)
    )

    @given(gaps, st.integers(0, 2), buckets, st.lists(arguments, min_size=1, max_size=8), st.booleans())
    def run(steps: list[int], first: int, sizes: list[int], pages: list[Any], is_regular: bool) -> None:
        ids = []
        for step in steps:
            ids.append((ids[-1] if ids else first - 1) + step)
        if is_regular:
            ids = list(range(len(ids)))
        kept = [count for n, count in enumerate(sizes) if sum(sizes[: n + 1]) <= len(ids)]
        store(stored, ids, kept)
        for limit, offset, newest_first, before in pages:
            found = repository.list_messages("s", "a", limit, offset, newest_first=newest_first, before=before)
            assert [message.message_id for message in found] == page(ids, limit, offset, newest_first, before)

    run()


def test_pages_from_the_end_until_the_beginning(repository: MongoDBSessionRepository, stored: Stored) -> None:
    store(stored, list(range(100)), [20, 30, 40])
    found: list[int] = []
    before = None
    while messages := repository.list_messages("s", "a", 7, newest_first=True, before=before):
        found += [message.message_id for message in messages]
        before = found[-1]
    assert found == list(range(99, -1, -1))


def test_messages_without_ids_are_paged_by_their_positions(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    """A session that a version before 1.0 has written and that nobody has opened since."""
    messages: list[Any] = [element(n) for n in range(6)]
    for message in messages:
        del message["message_id"]
    messages.insert(3, "no message")
    stored.insert_one({"_id": "s", "created_at": START, "agents": {"a": {"messages": messages, "agent_data": {}}}})
    newest = repository.list_messages("s", "a", 3, newest_first=True)
    rest = repository.list_messages("s", "a", newest_first=True, before=newest[-1].message_id)
    assert texts([message.to_message() for message in newest]) == ["m5", "m4", "m3"]
    assert texts([message.to_message() for message in rest]) == ["m2", "m1", "m0"]


LONG = 20_000


@pytest.mark.parametrize("gap", alternating(0, 1))
def test_a_page_costs_the_same_wherever_it_is(
    repository: MongoDBSessionRepository, stored: Stored, reads: Reads, gap: int
) -> None:
    ids = list(range(gap, LONG + gap))
    store(stored, ids, [500] * 39 + [400])
    costs = {}
    for before in (None, LONG, LONG - 50, LONG - 600, LONG // 2, 5_000, 1_700):
        reads.commands.clear()
        found = repository.list_messages("s", "a", 20, newest_first=True, before=before)
        last = (LONG + gap if before is None else before) - 1
        assert [message.message_id for message in found] == list(range(last, last - 20, -1))
        costs[before] = [cost(stored.database, asked) for asked in reads.commands]
    assert costs[None] == [(1, 1)]
    for before, parts in costs.items():
        assert len(parts) <= 2 + gap, before
        # The document of the session; then the buckets of which one can hold the page.
        assert sum(documents for documents, _ in parts) <= 1 + 4 + 4 * gap, before
        assert sum(keys for _, keys in parts) <= 1 + 5 + 5 * gap, before


def test_a_page_in_the_head_is_one_command_and_one_in_the_archive_two(
    factory: MongoDBSessionManagerFactory, commands: Any, stored: Stored
) -> None:
    store(stored, list(range(100)), [20, 30, 40])
    for before, count in ((None, 1), (99, 1), (92, 2), (40, 2)):
        commands.clear()
        read = partial(factory._async.list_messages, newest_first=True, before=before)
        factory._portal.call(read, "s", "a", 5)
        assert commands.names == ["find"] * count


def test_a_manager_pages_through_stored_and_recorded_messages(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s", max_embedded_messages=4) as manager:
        talker = agent(manager, *(f"a{n}" for n in range(5)))
        for number in range(5):
            talker(f"q{number}")
        newest = manager.list_messages("agent", 3, newest_first=True)
        following = manager.list_messages("agent", 3, newest_first=True, before=newest[-1].message_id)
        assert texts([message.to_message() for message in newest + following]) == ["a4", "q4", "a3", "q3", "a2", "q2"]
        assert manager.list_messages("agent", 2, 1, newest_first=True) == newest[1:]
        opened = manager.session_repository
        assert opened.list_messages("s", "agent", 3, newest_first=True) == newest
        assert opened.list_messages("s", "agent", 2, before=newest[-1].message_id) == manager.list_messages("agent", 2)


async def test_an_async_manager_pages_too(factory: MongoDBSessionManagerFactory) -> None:
    async with factory.create_session_manager_async("s") as manager:
        await agent(manager, "a").invoke_async("q")
        found = await manager.list_messages("agent", 1, newest_first=True)
        assert [message.message_id for message in found] == [1]


@pytest.mark.parametrize(
    "arguments",
    [{"before": -1}, {"before": "5"}, {"before": {"$gt": 0}}, {"before": True}, {"newest_first": "no"}],
    ids=str,
)
def test_what_cannot_be_used_is_named(repository: MongoDBSessionRepository, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        repository.list_messages("s", "a", **arguments)
