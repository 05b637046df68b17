"""An agent's conversation survives the end of its process: in synchronous code, then in asynchronous code.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/quickstart.py
expect:  a first process in which an agent is told a name and which then ends without closing anything, and a second
         one in which a new agent knows the name

The model is scripted and the MongoDB server is an embedded one; its data directory outlives both processes. With
MONGODB_URI set, the server is that one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile

from strands import Agent

from mongodb_session_manager import MongoDBSessionManager, create_mongodb_session_manager_async
from mongodb_session_manager.demo import ScriptedModel
from mongodb_session_manager.embedded import EmbeddedMongoDB

SESSION_ID = f"quickstart-{os.getpid()}"


def talk(uri: str, session_id: str) -> None:
    """Tell a new agent a name."""
    manager = MongoDBSessionManager(session_id, uri)
    agent = Agent(model=ScriptedModel(), session_manager=manager, callback_handler=None)
    say(agent, "user ", "Hello, my name is Ada.")
    say(agent, "agent", str(agent("Hello, my name is Ada.")))


async def ask(uri: str, session_id: str) -> None:
    """Ask another agent, in the same session, for the name."""
    manager = await create_mongodb_session_manager_async(session_id, uri)
    async with manager:
        agent = Agent(model=ScriptedModel(), session_manager=manager, callback_handler=None)
        say(agent, "agent", f"(restored {len(agent.messages)} messages)")
        say(agent, "user ", "What is my name?")
        say(agent, "agent", str(await agent.invoke_async("What is my name?")))


def say(agent: Agent, who: str, text: str) -> None:
    """Print a line of the conversation."""
    print(f"  [process {os.getpid()}] {who}: {text.strip()}", flush=True)


def run_step(step: str, session_id: str, data_directory: str) -> None:
    """Do one step in this process, and end it as a crash would: without closing anything."""
    uri = os.environ.get("MONGODB_URI")
    if uri is None:
        server = EmbeddedMongoDB(data_directory=data_directory)
        server.start()
        uri = server.connection_string
    if step == "talk":
        talk(uri, session_id)
    else:
        asyncio.run(ask(uri, session_id))
    os._exit(0)


def main() -> None:
    """Run both steps, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=["talk", "ask"], help=argparse.SUPPRESS)
    parser.add_argument("--session-id", default=SESSION_ID, help="the session (default: a new one)")
    parser.add_argument("--data-directory", help="keep the embedded server's data here (default: a temporary one)")
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.session_id, options.data_directory)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = options.data_directory or temporary
        for step, title in (("talk", "A first process:"), ("ask", "It is gone. A second process:")):
            print(title, flush=True)
            arguments = ["--step", step, "--session-id", options.session_id, "--data-directory", directory]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
    print("The conversation survived.")


if __name__ == "__main__":
    main()
