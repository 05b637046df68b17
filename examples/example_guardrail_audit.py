"""What a guardrail stopped is not stored; that it stepped in is, for an audit.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_guardrail_audit.py
expect:  a conversation in which a guardrail redacts a message, the same as it is stored, and an audit of all sessions

MONGODB_URI takes a real server. --model bedrock:MODEL_ID with --guardrail-id and --guardrail-version takes a real
guardrail, which redacts what it is configured for; see offline.py.
"""

from __future__ import annotations

from pymongo import MongoClient
from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import Redaction
from offline import make_model, mongodb, new_session_id, option_parser

SCRIPT = ["Good afternoon!", Redaction("[blocked by the guardrail]", "I cannot help with that.")]


def audit(uri: str) -> None:
    """Print every time a guardrail stepped in, in all sessions, with a plain PyMongo client."""
    with MongoClient(uri) as client:
        sessions = client.get_default_database("agent_sessions")["agent_sessions"]
        for session in sessions.find({"guardrail_events.0": {"$exists": True}}):
            for event in session["guardrail_events"]:
                print(f"  {session['_id']}: {event['action']} message {event['message_id']} of {event['agent_id']}")


def main() -> None:
    """Say something harmless and something that is redacted, and look at what is stored."""
    parser = option_parser(__doc__)
    parser.add_argument("--guardrail-id", help="a guardrail of Amazon Bedrock")
    parser.add_argument("--guardrail-version", default="DRAFT")
    options = parser.parse_args()
    guardrail = {"guardrail_id": options.guardrail_id, "guardrail_version": options.guardrail_version}
    model = make_model(options.model, SCRIPT, **guardrail if options.guardrail_id else {})
    session_id = new_session_id("guarded")
    with mongodb() as uri:
        with MongoDBSessionManager(session_id) as session:
            agent = Agent(model=model, agent_id="assistant", session_manager=session, callback_handler=None)
            for prompt in ("Good afternoon.", "My card number is 4111 1111 1111 1111."):
                print("user: ", prompt)
                print("agent:", str(agent(prompt)).strip())

        print("stored:")
        with MongoDBSessionManager(session_id) as session:
            agent = Agent(model=model, agent_id="assistant", session_manager=session, callback_handler=None)
            for message in agent.messages:
                print(f"  {message['role']}: {message['content'][0]['text'].strip()}")

        print("audit:")
        audit(uri)


if __name__ == "__main__":
    main()
