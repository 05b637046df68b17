"""A plain script without asyncio: each run goes on with the conversation where the last one ended.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_sync_script.py "My name is Ada." "What is my name?"
expect:  an answer per prompt, then what the session holds and what it cost

With MONGODB_URI set to a server that stays, run it again with --session-id and it goes on. --model takes a real model;
see offline.py.
"""

from __future__ import annotations

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from offline import make_model, mongodb, new_session_id, option_parser


def main() -> None:
    """Answer the prompts of the command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--session-id", default=new_session_id("script"), help="the session (default: a new one)")
    parser.add_argument("prompts", nargs="*", default=["My name is Ada.", "What is my name?"], metavar="PROMPT")
    options = parser.parse_args()
    with mongodb(), MongoDBSessionManager(options.session_id, application_name="script") as session:
        agent = Agent(
            model=make_model(options.model), agent_id="assistant", session_manager=session, callback_handler=None
        )
        print(f"session {options.session_id}, restored {len(agent.messages)} messages")
        for prompt in options.prompts:
            print("user: ", prompt)
            print("agent:", str(agent(prompt)).strip())

        usage = session.get_usage()["total"]
        print("messages:", session.get_message_count("assistant"))
        print("tokens:", usage["totalTokens"])


if __name__ == "__main__":
    main()
