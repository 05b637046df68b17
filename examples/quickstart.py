"""A conversation that survives the end of its process.

install: pip install 'mongodb-session-manager[embedded]'
run:     python quickstart.py && python quickstart.py
expect:  The first process tells an agent a name and ends. The second process restores the conversation, and the agent
         knows the name.

The data stays in the directory `quickstart-data`. To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import asyncio
import os

from strands import Agent

from mongodb_session_manager import create_mongodb_session_manager_async
from mongodb_session_manager.demo import ScriptedModel, demo_server


async def talk(connection_string: str) -> None:
    """Open the session, restore the conversation and add a turn to it."""
    async with create_mongodb_session_manager_async("ada-1", connection_string) as session:
        # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
        agent = Agent(model=ScriptedModel(), session_manager=session, callback_handler=None)
        print(f"process {os.getpid()} restored {len(agent.messages)} messages")
        prompt = "What is my name?" if agent.messages else "Hello, my name is Ada."
        print("  user: ", prompt)
        answer = await agent.invoke_async(prompt)
        print("  agent:", str(answer).strip())


if __name__ == "__main__":
    asyncio.run(talk(demo_server("quickstart-data")))
