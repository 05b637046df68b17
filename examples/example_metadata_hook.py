"""A hook around every use of metadata: it checks, changes, refuses and logs, whoever the caller is.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_metadata_hook.py
expect:  an update by the application and one by the agent pass through the hook; one that it refuses changes nothing

--model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from strands import Agent

from mongodb_session_manager import create_mongodb_session_manager_async
from offline import make_model, mongodb, new_session_id, option_parser

SCRIPT = [
    {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"Topic": "invoices"}}},
    "This conversation is about invoices.",
]


async def audit(original_func: Callable[..., Awaitable[Any]], action: str, session_id: str, **kwargs: Any) -> Any:
    """Write keys in lower case, refuse card numbers, and print what happens; a `def` hook works as well."""
    if action == "update":
        if "card_number" in kwargs["metadata"]:
            raise ValueError("card numbers are not stored")
        kwargs["metadata"] = {key.lower(): value for key, value in kwargs["metadata"].items()}
    result = await original_func(**kwargs)  # without this call nothing would happen
    print(f"hook: {action} {kwargs or ''}".rstrip())
    return result


async def talk(model_name: str) -> None:
    """Change metadata in three ways."""
    async with await create_mongodb_session_manager_async(new_session_id("hook"), metadata_hook=audit) as session:
        await session.update_metadata({"Customer": "Ada"})

        agent = Agent(
            model=make_model(model_name, SCRIPT),
            tools=[session.get_metadata_tool()],
            session_manager=session,
            callback_handler=None,
        )
        answer = await agent.invoke_async("Note that the topic of this conversation is invoices.")
        print("agent:", str(answer).strip())

        try:
            await session.update_metadata({"card_number": "4111 1111 1111 1111"})
        except ValueError as error:
            print("refused:", error)

        print("stored:", (await session.get_metadata())["metadata"])


def main() -> None:
    """Run the example."""
    options = option_parser(__doc__).parse_args()
    with mongodb():
        asyncio.run(talk(options.model))


if __name__ == "__main__":
    main()
