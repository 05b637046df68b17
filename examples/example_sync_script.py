"""A plain script without asyncio that continues where its last run ended.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_sync_script.py "My name is Ada." "What is my name?"
expect:  An answer to each prompt, then the number of messages and tokens of the session. The next run restores the
         messages of this one.

The data stays in the directory `script-data`. To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import sys

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server


def talk(prompts: list[str]) -> None:
    """Answer the prompts in the session `script`."""
    with MongoDBSessionManager("script", demo_server("script-data"), application_name="script") as session:
        # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
        agent = Agent(model=ScriptedModel(), agent_id="assistant", session_manager=session, callback_handler=None)
        print(f"restored {len(agent.messages)} messages")
        for prompt in prompts:
            print("user: ", prompt)
            print("agent:", str(agent(prompt)).strip())

        print("messages:", session.get_message_count("assistant"))
        print("tokens:", session.get_usage()["total"]["totalTokens"])


if __name__ == "__main__":
    talk(sys.argv[1:] or ["My name is Ada.", "What is my name?"])
