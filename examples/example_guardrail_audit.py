"""Redacted messages are never stored in full, and every intervention of a guardrail is recorded for audits.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_guardrail_audit.py
expect:  A conversation in which a guardrail redacts a message, the conversation as stored, and the guardrail events of
         all sessions.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from pymongo import MongoClient
from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import Redaction, ScriptedModel, demo_server

# In place of ScriptedModel, a model with a guardrail: BedrockModel(guardrail_id="...", guardrail_version="1")
MODEL = ScriptedModel(
    [
        "Good afternoon!",
        Redaction("[blocked by the guardrail]", "I cannot help with that."),
    ]
)


def talk(session_id: str, connection_string: str) -> None:
    """Say something harmless, and something that the guardrail redacts."""
    with MongoDBSessionManager(session_id, connection_string) as session:
        agent = Agent(model=MODEL, agent_id="assistant", session_manager=session, callback_handler=None)
        for prompt in ("Good afternoon.", "My card number is 4111 1111 1111 1111."):
            print("user: ", prompt)
            print("agent:", str(agent(prompt)).strip())


def show(session_id: str, connection_string: str) -> None:
    """Print the stored conversation."""
    with MongoDBSessionManager(session_id, connection_string) as session:
        agent = Agent(model=MODEL, agent_id="assistant", session_manager=session, callback_handler=None)
        for message in agent.messages:
            print(f"  {message['role']}: {message['content'][0]['text'].strip()}")


def audit(connection_string: str) -> None:
    """Print the guardrail events of all sessions, with a plain PyMongo client."""
    client: MongoClient[dict[str, Any]] = MongoClient(connection_string)
    with client:
        sessions = client.get_default_database("agent_sessions")["agent_sessions"]
        for session in sessions.find({"guardrail_events.0": {"$exists": True}}):
            for event in session["guardrail_events"]:
                print(f"  {session['_id']}: {event['action']} message {event['message_id']} of {event['agent_id']}")


def main() -> None:
    """Run the example."""
    session_id, connection_string = f"guarded-{uuid4().hex[:8]}", demo_server()
    talk(session_id, connection_string)
    print("stored:")
    show(session_id, connection_string)
    print("audit:")
    audit(connection_string)


if __name__ == "__main__":
    main()
