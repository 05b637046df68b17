"""Thumbs up and down: feedback is stored with the session, through a hook that adds to it and raises an alarm.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_feedback_hook.py
expect:  an answer, two ratings of which the bad one raises an alarm, and both as they are stored

--model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from offline import make_model, mongodb, new_session_id, option_parser


def alarm(original_func: Callable[..., Any], action: str, session_id: str, feedback: dict[str, Any]) -> Any:
    """Say where feedback came from, store it, and then tell somebody if it is bad; an `async def` hook works as well.

    A notification that needs the network must not hold up the caller: see `notify_later`.
    """
    result = original_func(feedback={**feedback, "channel": "web"})
    if feedback.get("rating") == "down":
        print("alarm: bad feedback:", feedback.get("comment"))
    return result


def main() -> None:
    """Ask something and rate the answer, twice."""
    options = option_parser(__doc__).parse_args()
    with mongodb(), MongoDBSessionManager(new_session_id("rated"), feedback_hook=alarm) as session:
        agent = Agent(model=make_model(options.model, ["Next Monday."]), session_manager=session, callback_handler=None)
        print("agent:", str(agent("When will my parcel arrive?")).strip())

        session.add_feedback({"rating": "up"})
        session.add_feedback({"rating": "down", "comment": "It did not arrive."})

        for feedback in session.get_feedbacks():
            print("stored:", feedback["rating"], feedback["channel"], feedback.get("comment", ""))


if __name__ == "__main__":
    main()
