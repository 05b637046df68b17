"""An agent keeps notes: it reads and writes the metadata of its session with a tool.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_metadata_tool.py
expect:  The agent stores a preference. It cannot change a key that belongs to the application. The application reads
         the stored metadata.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import asyncio
from uuid import uuid4

from strands import Agent

from mongodb_session_manager import create_mongodb_session_manager_async
from mongodb_session_manager.demo import ScriptedModel, demo_server

SYSTEM_PROMPT = "Store what the customer tells you about themselves under the key `preferences`, with manage_metadata."

# In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), OllamaModel(...)
MODEL = ScriptedModel(
    [
        {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"preferences.diet": "vegetarian"}}},
        "I noted that you are vegetarian.",
        {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"plan": "gold"}}},
        "I cannot change your plan.",
    ]
)


async def talk(connection_string: str) -> None:
    """Let the agent store one key and try to store another."""
    session_id = f"notes-{uuid4().hex[:8]}"
    async with create_mongodb_session_manager_async(session_id, connection_string) as session:
        await session.update_metadata({"plan": "silver"})  # set by the application
        agent = Agent(
            model=MODEL,
            system_prompt=SYSTEM_PROMPT,
            tools=[session.get_metadata_tool(allowed_keys=["preferences"])],
            session_manager=session,
            callback_handler=None,
        )
        for prompt in ("I am vegetarian.", "Set my plan to gold."):
            print("user: ", prompt)
            print("agent:", str(await agent.invoke_async(prompt)).strip())
        for message in agent.messages:
            for block in message["content"]:
                if "toolResult" in block:
                    print("tool: ", block["toolResult"]["content"][0]["text"])
        print("stored:", (await session.get_metadata())["metadata"])


if __name__ == "__main__":
    asyncio.run(talk(demo_server()))
