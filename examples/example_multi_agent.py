"""A process is killed while its graph of agents runs, and another process completes the graph.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_multi_agent.py
expect:  In a first process, the researcher finishes, and the process is killed when the writer starts. In a second
         process, the writer starts again, and the editor follows. The researcher does not run again.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from uuid import uuid4

from strands import Agent
from strands.hooks import BeforeNodeCallEvent
from strands.multiagent.graph import Graph, GraphBuilder

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server

NODES = {
    "researcher": ("Collect three facts on the subject.", "Facts: MongoDB stores documents."),
    "writer": ("Write one sentence from the facts.", "MongoDB is a database that stores documents."),
    "editor": ("Make the sentence shorter.", "MongoDB stores documents."),
}


def build_graph(session: MongoDBSessionManager) -> Graph:
    """Return a graph of three agents in a row. The session manager belongs to the graph, not to its nodes."""
    builder = GraphBuilder().set_graph_id("article").set_execution_timeout(600).set_session_manager(session)
    for name, (system_prompt, answer) in NODES.items():
        # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
        model = ScriptedModel([answer])
        builder.add_node(Agent(name=name, model=model, system_prompt=system_prompt, callback_handler=None), name)
    builder.add_edge("researcher", "writer")
    builder.add_edge("writer", "editor")
    return builder.build()


def work(session_id: str, kill_at: str = "") -> None:
    """Run the graph of a session, from its start or from where its last process stopped."""

    def show(event: BeforeNodeCallEvent) -> None:
        print(f"  {event.node_id} starts", flush=True)
        if event.node_id == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # kill -9: nothing is closed or cleaned up

    with MongoDBSessionManager(session_id, demo_server()) as session:
        graph = build_graph(session)
        graph.hooks.add_callback(BeforeNodeCallEvent, show)
        result = graph("What is MongoDB?")
        print("  result:", str(result.results["editor"].result).strip())


def main() -> None:
    """Run the graph in a process that is killed, and then in another one."""
    demo_server()  # both processes use this server
    command = [sys.executable, __file__, f"graph-{uuid4().hex[:8]}"]
    print("A first process:", flush=True)
    first = subprocess.run([*command, "writer"])
    print(f"It ended with {signal.Signals(-first.returncode).name}. A second process:", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        work(*sys.argv[1:])
    else:
        main()
