"""A graph of agents whose process is killed goes on in another process with the node that was not done.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_multi_agent.py
expect:  a first process in which the researcher finishes and the writer is killed at work, and a second process, in
         which the writer begins again and the editor follows, while the researcher's work is not repeated

--model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from strands import Agent
from strands.hooks import BeforeNodeCallEvent, HookProvider, HookRegistry
from strands.multiagent.graph import Graph, GraphBuilder

from mongodb_session_manager import MongoDBSessionManager
from offline import make_model, mongodb, new_session_id, option_parser

NODES = {
    "researcher": ("Collect three facts on the subject.", "Facts: MongoDB stores documents."),
    "writer": ("Write one sentence from the facts.", "MongoDB is a database that stores documents."),
    "editor": ("Make the sentence shorter.", "MongoDB stores documents."),
}


class ShowNodes(HookProvider):
    """Prints the name of each node that begins, and kills the process as one of them does."""

    def __init__(self, kill_at: str | None) -> None:
        self._kill_at = kill_at

    def register_hooks(self, registry: HookRegistry, **kwargs: object) -> None:
        """Register what prints and kills."""
        registry.add_callback(BeforeNodeCallEvent, self._begins)

    def _begins(self, event: BeforeNodeCallEvent) -> None:
        print(f"  {event.node_id} begins", flush=True)
        if event.node_id == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # kill -9: nothing is closed or tidied up


def build_graph(session: MongoDBSessionManager, model_name: str, kill_at: str | None) -> Graph:
    """Return a graph whose nodes follow one another; the session manager is the graph's, not the nodes'."""
    builder = GraphBuilder().set_graph_id("article").set_execution_timeout(600)
    builder.set_session_manager(session).set_hook_providers([ShowNodes(kill_at)])
    for name, (system_prompt, answer) in NODES.items():
        model = make_model(model_name, [answer])
        builder.add_node(Agent(name=name, model=model, system_prompt=system_prompt, callback_handler=None), name)
    builder.add_edge("researcher", "writer")
    builder.add_edge("writer", "editor")
    return builder.build()


def work(session_id: str, model_name: str, kill_at: str | None) -> None:
    """Run the graph, or go on with it if the session holds one that is not done."""
    with MongoDBSessionManager(session_id) as session:
        result = build_graph(session, model_name, kill_at)("What is MongoDB?")
        print("  result:", str(result.results["editor"].result).strip())


def main() -> None:
    """Run the graph in a process that is killed, and then in another one."""
    parser = option_parser(__doc__)
    parser.add_argument("--work-on", metavar="SESSION_ID", help="run the graph of this session in this process")
    parser.add_argument("--kill-at", choices=NODES, help="kill this process when that node begins")
    options = parser.parse_args()
    if options.work_on:
        work(options.work_on, options.model, options.kill_at)
        return

    command = [sys.executable, __file__, "--model", options.model, "--work-on", new_session_id("graph")]
    with mongodb():
        print("A first process:", flush=True)
        first = subprocess.run([*command, "--kill-at", "writer"])
        print(f"It ended with {signal.Signals(-first.returncode).name}. A second process:", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
