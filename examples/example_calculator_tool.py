"""Tool calls and their results are part of the conversation: a new agent gets them back.

install: pip install 'mongodb-session-manager[embedded]'
run:     python examples/example_calculator_tool.py
expect:  an agent that multiplies two numbers with a tool, and a second agent of the same session that restores the
         question, the call, its result and the answer

--model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

from typing import Literal

from strands import Agent, tool
from strands.types.content import ContentBlock

from mongodb_session_manager import MongoDBSessionManager
from offline import make_model, mongodb, new_session_id, option_parser


@tool
def calculator(left: float, operation: Literal["+", "-", "*", "/"], right: float) -> float:
    """Calculate with two numbers.

    Args:
        left: The first number.
        operation: What to do with them.
        right: The second number.
    """
    match operation:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left / right


SCRIPT = [
    {"tool": "calculator", "input": {"left": 12, "operation": "*", "right": 34}},
    "12 times 34 is 408.",
]


def describe(block: ContentBlock) -> str:
    """Return one part of a message in a line."""
    if "toolUse" in block:
        return f"calls {block['toolUse']['name']} with {block['toolUse']['input']}"
    if "toolResult" in block:
        return f"gets {block['toolResult']['content'][0]['text']}"
    return block["text"].strip()


def main() -> None:
    """Have one agent calculate, and another one remember it."""
    options = option_parser(__doc__).parse_args()
    model, session_id = make_model(options.model, SCRIPT), new_session_id("calculator")
    with mongodb():
        with MongoDBSessionManager(session_id) as session:
            agent = Agent(model=model, tools=[calculator], session_manager=session, callback_handler=None)
            print("answer:", str(agent("What is 12 times 34? Use the calculator.")).strip())

        with MongoDBSessionManager(session_id) as session:
            agent = Agent(model=model, tools=[calculator], session_manager=session, callback_handler=None)
            print(f"restored {len(agent.messages)} messages:")
            for message in agent.messages:
                for block in message["content"]:
                    print(f"  {message['role']}: {describe(block)}")


if __name__ == "__main__":
    main()
