"""A feedback hook adds a field to every rating, and raises an alarm for bad ones.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_feedback_hook.py
expect:  An answer, two ratings, an alarm for the bad one, and both ratings as stored.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server

# In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), OllamaModel(...)
MODEL = ScriptedModel(["Next Monday."])


def alarm(original_func: Callable[..., Any], action: str, session_id: str, feedback: dict[str, Any]) -> Any:
    """Store feedback with its channel, and print an alarm if it is bad. An `async def` hook works as well.

    The caller waits for the hook. To send a notification over the network, use `notify_later`, which does not wait.
    """
    result = original_func(feedback={**feedback, "channel": "web"})
    if feedback.get("rating") == "down":
        print("alarm: bad feedback:", feedback.get("comment"))
    return result


def main() -> None:
    """Ask a question and rate the answer twice."""
    session_id = f"rated-{uuid4().hex[:8]}"
    with MongoDBSessionManager(session_id, demo_server(), feedback_hook=alarm) as session:
        agent = Agent(model=MODEL, session_manager=session, callback_handler=None)
        print("agent:", str(agent("When will my parcel arrive?")).strip())

        session.add_feedback({"rating": "up"})
        session.add_feedback({"rating": "down", "comment": "It did not arrive."})

        for feedback in session.get_feedbacks():
            print("stored:", feedback["rating"], feedback["channel"], feedback.get("comment", ""))


if __name__ == "__main__":
    main()
