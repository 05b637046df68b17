"""A plain script without asyncio: each run continues the conversation where the last run ended.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_sync_script.py "My name is Ada." "What is my name?"
expect:  an answer per prompt, then the number of messages and tokens of the session; a second run restores the messages
         of the first

The MongoDB server is an embedded one that keeps its data in the directory `script-data`; MONGODB_URI takes a real
server. --session-id begins or continues another conversation. --model takes a real model; see offline.py.
"""

from __future__ import annotations

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from offline import make_model, mongodb, option_parser


def main() -> None:
    """Answer the prompts of the command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--session-id", default="script", help="the session (default: %(default)s)")
    parser.add_argument("--data-directory", default="script-data", help="of the embedded server (default: %(default)s)")
    parser.add_argument("prompts", nargs="*", default=["My name is Ada.", "What is my name?"], metavar="PROMPT")
    options = parser.parse_args()
    with (
        mongodb(options.data_directory),
        MongoDBSessionManager(options.session_id, application_name="script") as session,
    ):
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
