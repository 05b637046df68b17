"""A metadata hook checks, changes, refuses and logs every use of metadata, by the application and by the agent.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_metadata_hook.py
expect:  The hook writes the keys of two updates in lower case. It refuses a third update, which changes nothing.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from strands import Agent

from mongodb_session_manager import create_mongodb_session_manager_async
from mongodb_session_manager.demo import ScriptedModel, demo_server

# In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), OllamaModel(...)
MODEL = ScriptedModel(
    [
        {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"Topic": "invoices"}}},
        "This conversation is about invoices.",
    ]
)


async def audit(original_func: Callable[..., Awaitable[Any]], action: str, session_id: str, **kwargs: Any) -> Any:
    """Write keys in lower case, refuse card numbers and log each action. A `def` hook works as well."""
    if action == "update":
        if "card_number" in kwargs["metadata"]:
            raise ValueError("card numbers are not stored")
        kwargs["metadata"] = {key.lower(): value for key, value in kwargs["metadata"].items()}
    result = await original_func(**kwargs)  # stores; without this call, nothing is stored
    print(f"hook: {action} {kwargs or ''}".rstrip())
    return result


async def talk(connection_string: str) -> None:
    """Update metadata from the application, from the agent, and with a key that the hook refuses."""
    session_id = f"hook-{uuid4().hex[:8]}"
    async with create_mongodb_session_manager_async(session_id, connection_string, metadata_hook=audit) as session:
        await session.update_metadata({"Customer": "Ada"})

        agent = Agent(model=MODEL, tools=[session.get_metadata_tool()], session_manager=session, callback_handler=None)
        answer = await agent.invoke_async("Note that the topic of this conversation is invoices.")
        print("agent:", str(answer).strip())

        try:
            await session.update_metadata({"card_number": "4111 1111 1111 1111"})
        except ValueError as error:
            print("refused:", error)

        print("stored:", (await session.get_metadata())["metadata"])


if __name__ == "__main__":
    asyncio.run(talk(demo_server()))
