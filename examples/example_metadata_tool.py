"""An agent that keeps notes: it reads and writes the metadata of its session with a tool.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_metadata_tool.py
expect:  the agent stores a preference, is refused a key that is not its own, and the application reads what is stored

--model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

import asyncio

from strands import Agent

from mongodb_session_manager import create_mongodb_session_manager_async
from offline import make_model, mongodb, new_session_id, option_parser

SYSTEM_PROMPT = "Note what the customer tells you of themselves under the key `preferences`, with manage_metadata."

SCRIPT = [
    {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"preferences.diet": "vegetarian"}}},
    "I noted that you are vegetarian.",
    {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"plan": "gold"}}},
    "I cannot change your plan.",
]


async def talk(model_name: str) -> None:
    """Tell the agent something of use, and then ask too much of it."""
    async with await create_mongodb_session_manager_async(new_session_id("notes")) as session:
        await session.update_metadata({"plan": "silver"})  # the application's own
        agent = Agent(
            model=make_model(model_name, SCRIPT),
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
                    print("the tool said:", block["toolResult"]["content"][0]["text"])
        print("stored:", (await session.get_metadata())["metadata"])


def main() -> None:
    """Run the example."""
    options = option_parser(__doc__).parse_args()
    with mongodb():
        asyncio.run(talk(options.model))


if __name__ == "__main__":
    main()
