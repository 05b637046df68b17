"""A session against a plain-Python model of it: whatever happens, in whatever order, it reopens as the model says."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from strands import Agent, tool
from strands.agent.conversation_manager import NullConversationManager, SlidingWindowConversationManager
from strands.types.session import SessionMessage

from mongodb_session_manager import (
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
)
from mongodb_session_manager.demo import Redaction
from support import agent, fail_point

LIMITS = {"max_embedded_messages": 4, "max_embedded_bytes": 4096}
WHOLE, WINDOWED = AGENTS = ("whole", "windowed")

slots = st.sampled_from(["first", "second"])
agent_ids = st.sampled_from(AGENTS)
words = st.text(st.characters(codec="utf-8"), max_size=20) | st.just("x" * 1500)


@tool
def look(at: str) -> str:
    """Look at something."""
    return f"I see {at}"


def said(message: Any) -> tuple[str, list[Any]]:
    """Return what a message says: its role, and texts, calls and results."""

    def block(content: Any) -> Any:
        if "toolUse" in content:
            return ("call", content["toolUse"]["input"])
        if "toolResult" in content:
            return ("result", content["toolResult"]["content"][0]["text"])
        return content["text"]

    return message["role"], [block(content) for content in message["content"]]


@dataclass
class Slot:
    """A manager somebody holds, and how long each conversation was when it last knew."""

    manager: MongoDBSessionManager
    seen: dict[str, int]
    agents: dict[str, Agent] = field(default_factory=dict)

    def agent(self, agent_id: str) -> Agent:
        if agent_id not in self.agents:
            window = NullConversationManager() if agent_id == WHOLE else SlidingWindowConversationManager(window_size=4)
            self.agents[agent_id] = agent(self.manager, agent_id=agent_id, conversation_manager=window, tools=[look])
        return self.agents[agent_id]


class Session(RuleBasedStateMachine):
    def __init__(self, server: str, repository: MongoDBSessionRepository, database: str) -> None:
        super().__init__()
        self.server, self.repository, self.database = server, repository, database
        self.session_id = uuid4().hex
        self.factory = self.new_factory()
        self.slots: dict[str, Slot] = {}
        self.conversations: dict[str, list[tuple[str, list[Any]]]] = {agent_id: [] for agent_id in AGENTS}
        self.window: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.changed: set[str] = set()
        """The agents whose conversations have changed since they were compared."""

    def new_factory(self) -> MongoDBSessionManagerFactory:
        return MongoDBSessionManagerFactory(self.server, self.database, **LIMITS)

    def teardown(self) -> None:
        with self.factory:
            self.changed = {*AGENTS}
            self.reopens_as_the_model_says()

    # What users do.

    @initialize(before=st.integers(0, 8))
    def begin(self, before: int) -> None:
        self.open("first")
        for agent_id in AGENTS:
            self.turns("first", agent_id, ["before"] * before)
        self.open("second")

    @rule(slot=slots)
    def open(self, slot: str) -> None:
        if slot in self.slots:
            self.slots[slot].manager.close()
        seen = {agent_id: len(conversation) for agent_id, conversation in self.conversations.items()}
        self.slots[slot] = Slot(self.factory.create_session_manager(self.session_id), seen)

    @rule(slot=slots, agent_id=agent_ids, texts=st.lists(words, min_size=1, max_size=6))
    def turns(self, slot: str, agent_id: str, texts: list[str]) -> None:
        for text in texts:
            self._turn(slot, agent_id, text, ["answer"], ("user", [text]), ("assistant", ["answer"]))

    @rule(slot=slots, agent_id=agent_ids, at=words)
    def turn_with_a_tool(self, slot: str, agent_id: str, at: str) -> None:
        self._turn(
            slot,
            agent_id,
            "look",
            [{"tool": "look", "input": {"at": at}}, "I looked"],
            ("user", ["look"]),
            ("assistant", [("call", {"at": at})]),
            ("user", [("result", f"I see {at}")]),
            ("assistant", ["I looked"]),
        )

    @rule(slot=slots, agent_id=agent_ids, text=words)
    def turn_that_a_guardrail_stops(self, slot: str, agent_id: str, text: str) -> None:
        self._turn(slot, agent_id, text, [Redaction("[gone]", "No.")], ("user", ["[gone]"]), ("assistant", ["No."]))

    def _turn(self, slot: str, agent_id: str, text: str, replies: list[Any], *told: tuple[str, list[Any]]) -> None:
        holder, conversation = self.slots[slot], self.conversations[agent_id]
        live = holder.agent(agent_id)
        live.model.replies.extend(replies)  # type: ignore[attr-defined]
        if holder.seen[agent_id] != len(conversation):
            with pytest.raises(SessionConflictError):
                live(text)
            self.open(slot)
            return
        live(text)
        self.changed.add(agent_id)
        conversation += told
        holder.seen[agent_id] = len(conversation)
        if agent_id == WINDOWED:
            self.window = copy.deepcopy(live.messages)

    @precondition(lambda self: self.conversations[WHOLE])
    @rule(data=st.data(), text=words, redacted=st.booleans())
    def replace(self, data: st.DataObject, text: str, redacted: bool) -> None:
        conversation = self.conversations[WHOLE]
        plain = [n for n, (_, blocks) in enumerate(conversation) if all(isinstance(block, str) for block in blocks)]
        position = data.draw(st.sampled_from(plain))
        event(
            "replaced in the archive"
            if position < len(conversation) - LIMITS["max_embedded_messages"]
            else "in the head"
        )
        role, _ = conversation[position]
        message: Any = {"role": role, "content": [{"text": text}]}
        other: Any = {"role": role, "content": [{"text": "original"}]}
        new = SessionMessage(other if redacted else message, position, message if redacted else None)
        self.repository.update_message(self.session_id, WHOLE, new)
        conversation[position] = (role, [text])
        self.changed.add(WHOLE)

    @rule(slot=slots, changed=st.dictionaries(st.sampled_from("abc"), words))
    def update_metadata(self, slot: str, changed: dict[str, Any]) -> None:
        self.slots[slot].manager.update_metadata(changed)
        self.metadata |= changed

    @rule(slot=slots, keys=st.lists(st.sampled_from("abc")))
    def delete_metadata(self, slot: str, keys: list[str]) -> None:
        self.slots[slot].manager.delete_metadata(keys)
        self.metadata = {key: value for key, value in self.metadata.items() if key not in keys}

    @rule(slot=slots, agent_id=agent_ids, before=st.sampled_from(["aggregate", "findAndModify"]), text=words)
    def crash_in_a_move(self, slot: str, agent_id: str, before: str, text: str) -> None:
        """The process ends before the command that copies old messages, or before the one that cuts them out."""
        with fail_point(self.server, failCommands=[before], errorCode=8):
            if self.slots[slot].seen[agent_id] == len(self.conversations[agent_id]):
                self.turns(slot, agent_id, [text])
            self.factory.close()
        self.factory = self.new_factory()
        self.changed.add(agent_id)
        self.slots.clear()
        self.open("first")
        self.open("second")

    # What they find.

    @invariant()
    def reopens_as_the_model_says(self) -> None:
        with self.factory.create_session_manager(self.session_id) as manager:
            reopened = Slot(manager, {})
            assert manager.get_metadata() == {"metadata": self.metadata}
            changed = {agent_id: self.conversations[agent_id] for agent_id in self.changed}
            if changed.get(WHOLE):
                assert [said(message) for message in reopened.agent(WHOLE).messages] == changed[WHOLE]
            if changed.get(WINDOWED):
                assert reopened.agent(WINDOWED).messages == self.window
        for agent_id, conversation in changed.items():
            if conversation:
                self._lists_as_the_model_says(agent_id, conversation)
        self.changed.clear()

    def _lists_as_the_model_says(self, agent_id: str, conversation: list[tuple[str, list[Any]]]) -> None:
        listed = self.repository.list_messages(self.session_id, agent_id)
        assert [message.message_id for message in listed] == list(range(len(conversation)))
        assert [said(message.to_message()) for message in listed] == conversation
        offset, limit = len(conversation) // 3, len(conversation) // 2
        some = self.repository.list_messages(self.session_id, agent_id, limit, offset)
        assert [said(message.to_message()) for message in some] == conversation[offset : offset + limit]
        assert self.repository.get_message_count(self.session_id, agent_id) == len(conversation)


def test_a_session_is_what_the_model_says(server: str, database: str) -> None:
    with MongoDBSessionRepository(server, database, **LIMITS) as repository:
        run_state_machine_as_test(
            lambda: Session(server, repository, database),
            settings=settings(max_examples=settings.default.max_examples // 10, stateful_step_count=25),
        )
