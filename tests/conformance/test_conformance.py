"""A conversation that is interrupted at any message continues in another process without a difference for the model.

Each conversation of the table is played once to its end. After every write, the session is copied. The copy is the
state that a process leaves behind if it is killed at this point. A new manager and a new agent resume each copy and
play it to its end. The model must receive the same requests as without the interruption.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pymongo
import pytest
from strands import Agent
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.experimental.context_manager import Offload
from strands.hooks import MessageAddedEvent

from conversations import CONVERSATIONS, TOOLS, Conversation, Turn, user
from mongodb_session_manager import MongoDBSessionManagerFactory
from recording_model import RecordingModel, comparable, overflow
from support import run_random

Stored = pymongo.collection.Collection[dict[str, Any]]

# The constructor of an agent reads files on the event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.may_block]


def copied(value: Any) -> Any:
    """Return a copy, in a tenth of the time of `deepcopy`."""
    return pickle.loads(pickle.dumps(value))


# Kinds of managers and agents.


class Kind:
    """The asynchronous manager: opens managers and calls agents on a running event loop."""

    def __init__(self, factory: MongoDBSessionManagerFactory) -> None:
        self._factory = factory

    async def open(self, session_id: str) -> Any:
        return await self._factory.create_session_manager_async(session_id)

    async def make(self, build: Callable[[], Agent]) -> Agent:
        return build()

    async def call(self, agent: Agent, prompt: Any, options: dict[str, Any]) -> Any:
        return await agent.invoke_async(prompt, **options)

    async def direct(self, agent: Agent, turn: Callable[[Agent], Any]) -> None:
        turn(agent)

    async def sync(self, manager: Any, agent: Agent) -> None:
        manager.sync_agent(agent)
        await manager.flush()


class Streamed(Kind):
    async def call(self, agent: Agent, prompt: Any, options: dict[str, Any]) -> Any:
        async for event in agent.stream_async(prompt, **options):
            last = event
        return last["result"]


class Sync(Kind):
    """The synchronous manager, on threads without an event loop."""

    async def open(self, session_id: str) -> Any:
        return await asyncio.to_thread(self._factory.create_session_manager, session_id)

    async def make(self, build: Callable[[], Agent]) -> Agent:
        return await asyncio.to_thread(build)

    async def call(self, agent: Agent, prompt: Any, options: dict[str, Any]) -> Any:
        return await asyncio.to_thread(agent, prompt, **options)

    async def direct(self, agent: Agent, turn: Callable[[Agent], Any]) -> None:
        await asyncio.to_thread(turn, agent)

    async def sync(self, manager: Any, agent: Agent) -> None:
        await asyncio.to_thread(manager.sync_agent, agent)


@pytest.fixture(scope="module")
def module_factory(server: str) -> Iterator[tuple[MongoDBSessionManagerFactory, Stored]]:
    name = f"test_{uuid.uuid4().hex}"
    with pymongo.MongoClient(server) as client, MongoDBSessionManagerFactory(server, name) as factory:
        yield factory, client[name]["agent_sessions"]
        client.drop_database(name)


@pytest.fixture
def stored(module_factory: tuple[MongoDBSessionManagerFactory, Stored]) -> Stored:
    return module_factory[1]


KINDS = {"sync": Sync, "async": Kind, "streamed": Streamed}


@pytest.fixture
def kind(request: pytest.FixtureRequest, module_factory: tuple[MongoDBSessionManagerFactory, Stored]) -> Kind:
    made: Kind = request.param(module_factory[0])
    return made


# Conversation managers. Each conversation begins with four messages and ends with an overflow of the context window.

GREETING = [user("hello"), {"role": "assistant", "content": [{"text": "Hello."}]}, user("my name is Ada")]
BEFORE = ([GREETING], ["Hello Ada."])
AFTER = (["what is my name?", "bye"], [overflow(), "You are Ada.", "Ada.", "Bye."])


@dataclass(frozen=True)
class Management:
    """Attributes: further arguments of the agent, and whether it recovers from an overflow of the context window."""

    options: Callable[[], dict[str, Any]]
    overflows: bool = True


MANAGEMENTS = {
    "null": Management(lambda: {"conversation_manager": NullConversationManager()}),
    "sliding window": Management(
        lambda: {"conversation_manager": SlidingWindowConversationManager(4, should_truncate_results=False)}
    ),
    "sliding window per turn": Management(
        lambda: {"conversation_manager": SlidingWindowConversationManager(3, False, per_turn=2)}
    ),
    "summarizing": Management(
        lambda: {"conversation_manager": SummarizingConversationManager(0.5, preserve_recent_messages=2)}
    ),
    "context manager": Management(
        lambda: {
            "context_manager": {
                "strategies": [Offload.truncate("tool_results", {"preview_tokens": 2}).when(threshold=3)]
            }
        },
        overflows=False,
    ),
}


# Playing a conversation.


@dataclass
class Cut:
    """A point at which a conversation was interrupted.

    Attributes:
        document: A copy of the session, with another id.
        turn: The number of the turn.
        is_over: Whether that turn was complete.
        added: The number of messages that the turn had added.
        calls: The number of calls of the model.
        messages: The messages of the agent.
    """

    document: dict[str, Any]
    turn: int
    is_over: bool
    added: int
    calls: int
    messages: list[Any]


class Play:
    """A conversation played by one agent.

    Args:
        kind: The kind of manager.
        conversation: The prompts and replies.
        management: The conversation manager.
        calls: The number of earlier calls of the model.
    """

    def __init__(self, kind: Kind, conversation: Conversation, management: str, calls: int = 0) -> None:
        self._kind, self._conversation, self._management = kind, conversation, MANAGEMENTS[management]
        ends = AFTER if self._management.overflows and not conversation.stateful else ([], [])
        turns = [*BEFORE[0], *conversation.turns, *ends[0]]
        # A conversation that the provider keeps has no stored messages, so it can only continue after a complete turn.
        self.turns = [turn if isinstance(turn, Turn) else Turn(turn, whole=conversation.stateful) for turn in turns]
        replies = [*BEFORE[1], *conversation.replies, *ends[1]]
        self.model = RecordingModel(replies[calls:], stateful=conversation.stateful)
        self.outcomes: list[str] = []
        self.prompts: list[Any] = []
        self.restored: list[Any] = []

    async def begin(self, manager: Any) -> Agent:
        self._manager = manager

        def build() -> Agent:
            options = {} if self._conversation.stateful else self._management.options()
            options |= {"system_prompt": "Be kind."} | self._conversation.options()
            return Agent(
                model=self.model,
                tools=TOOLS,
                agent_id="agent",
                session_manager=manager,
                callback_handler=None,
                retry_strategy=None,
                load_tools_from_directory=False,
                **options,
            )

        self.agent = self.model.agent = await self._kind.make(build)
        self.restored = copied(self.agent.messages)
        return self.agent

    async def play(self) -> None:
        """Run all turns, and record their prompts."""
        result = None
        for number, turn in enumerate(self.turns):
            self.prompts.append(turn.prompt(result) if callable(turn.prompt) else turn.prompt)
            result = await self.take(turn, copied(self.prompts[-1]))
            self.has_taken(number)

    def has_taken(self, number: int) -> None:
        """Called after each turn."""

    async def take(self, turn: Turn, prompt: Any) -> Any:
        """Run a turn and record its outcome."""
        try:
            if turn.direct is not None:
                await self._kind.direct(self.agent, turn.direct)
                if self._manager is not None:  # no event reports that the window has moved
                    await self._kind.sync(self._manager, self.agent)
                return None
            result = await self._kind.call(self.agent, prompt, turn.options)
        except Exception as error:
            self.outcomes.append(type(error).__name__)
            return None
        self.outcomes.append(result.stop_reason)
        return result


class Reference(Play):
    """A play with a session manager. `cuts` are the copies of the session after each write."""

    async def copy_all(self, session_id: str, stored: Stored, end_of: int) -> None:
        """Play, and copy the session from the end of a turn on; with -1, from its beginning."""
        self._session_id, self._stored, self._end_of = session_id, stored, end_of
        self._told: Any = None
        self._turn = self._count = 0
        self.cuts: list[Cut] = []
        agent = await self.begin(await self._kind.open(session_id))
        agent.hooks.add_callback(MessageAddedEvent, self._added)  # after the session manager has stored the message
        await self.play()

    def _added(self, event: MessageAddedEvent) -> None:
        self._count += 1
        if self._turn > self._end_of and not self.turns[self._turn].whole:
            self._cut(is_over=False)

    def has_taken(self, number: int) -> None:
        last = self.cuts[-1] if self.cuts else None
        was_last = last is not None and not last.is_over and last.calls == len(self.model.calls)
        if was_last and not any("toolUse" in block for block in last.messages[-1]["content"]):
            self.cuts.pop()  # that message ended the turn, but the cut is marked as unfinished
        if number >= self._end_of:
            self._cut(is_over=True)
        self._turn, self._count = number + 1, 0

    def _cut(self, *, is_over: bool) -> None:
        document = self._stored.find_one({"_id": self._session_id})
        assert document is not None
        told = [element["message"] for element in document["agents"]["agent"]["messages"]]
        if not is_over and told == self._told:
            return  # the last message is stored at the end of the turn: a process killed here leaves the previous copy
        self._told = told
        document["_id"] = document["session_id"] = f"{self._session_id}/{self._turn}/{self._count}/{is_over}"
        messages = copied(self.agent.messages)
        self.cuts.append(Cut(document, self._turn, is_over, self._count, len(self.model.calls), messages))


async def resumed(kind: Kind, conversation: Conversation, management: str, reference: Reference, cut: Cut) -> Play:
    """Return the play that continues from a cut."""
    play = Play(kind, conversation, management, cut.calls)
    await play.begin(await kind.open(cut.document["_id"]))
    first = cut.turn + 1
    if not cut.is_over:
        # The caller repeats a prompt that was not stored; otherwise the agent continues with the stored messages.
        prompt = reference.prompts[cut.turn]
        is_messages = isinstance(prompt, list) and "role" in prompt[0]
        rest = prompt[cut.added :] if is_messages else []
        await play.take(play.turns[cut.turn], copied(rest) or None)
    for number in range(first, len(play.turns)):
        await play.take(play.turns[number], copied(reference.prompts[number]))
    return play


def sampled_cases() -> Iterator[tuple[str, Conversation, str]]:
    """Yield each conversation once, with a management and a kind that are drawn evenly, and differently in each run."""
    random = run_random()
    conversations = random.sample(CONVERSATIONS, len(CONVERSATIONS))
    pairs = random.sample(list(itertools.product(KINDS, MANAGEMENTS)), len(KINDS) * len(MANAGEMENTS))
    for conversation, (kind, management) in zip(conversations, itertools.cycle(pairs)):
        yield kind, conversation, management


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Sample kinds, conversations and managements; `--full-conformance` combines all of them."""
    if "management" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full-conformance")
    every = itertools.product(KINDS, CONVERSATIONS, MANAGEMENTS)
    cases = [
        pytest.param(KINDS[kind], conversation, management, id=f"{conversation.name}-{management}-{kind}")
        for kind, conversation, management in (every if full else sampled_cases())
    ]
    metafunc.parametrize(("kind", "conversation", "management"), cases, indirect=["kind"])


async def test_a_conversation_cut_at_any_message(
    kind: Kind,
    stored: Stored,
    conversation: Conversation,
    management: str,
    some: Callable[[list[Cut], int], list[Cut]],
) -> None:
    alone, reference = await played_alone(kind, conversation, management), Reference(kind, conversation, management)
    # The turn that all conversations begin with is only cut in the first conversation.
    end_of = -1 if conversation is CONVERSATIONS[0] else len(BEFORE[0]) - 1
    await reference.copy_all(f"{conversation.name}, {management}, {uuid.uuid4().hex}", stored, end_of)
    assert comparable(reference.model.calls) == comparable(alone.model.calls)
    assert reference.outcomes == alone.outcomes
    assert len(reference.cuts) > len(conversation.turns)
    cuts = some(reference.cuts, (len(reference.cuts) + 2) // 3)
    stored.insert_many(cut.document for cut in cuts)

    async def go_on(cut: Cut) -> None:
        again = await resumed(kind, conversation, management, reference, cut)
        where = f"cut in turn {cut.turn} after {cut.added} messages, over: {cut.is_over}"
        if management != "context manager":  # it changes the messages of the agent when the model is called
            assert again.restored == cut.messages, where
        assert comparable(again.model.calls) == comparable(reference.model.calls[cut.calls :]), where
        assert again.outcomes == reference.outcomes[len(reference.outcomes) - len(again.outcomes) :], where

    await asyncio.gather(*map(go_on, cuts))


_alone: dict[tuple[str, str], Play] = {}


async def played_alone(kind: Kind, conversation: Conversation, management: str) -> Play:
    """Return the play of an agent without a session manager."""
    key = (conversation.name, management)
    if key not in _alone:
        play = Play(kind, conversation, management)
        await play.begin(None)
        await play.play()
        _alone[key] = play
    return _alone[key]
