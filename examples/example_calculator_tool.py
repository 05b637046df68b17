"""A restored conversation includes tool calls and their results.

install: pip install 'mongodb-session-manager[embedded]'
run:     python example_calculator_tool.py
expect:  One agent multiplies two numbers with a tool. A second agent of the same session restores the question, the
         tool call, its result and the answer.

To use your own server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

from strands import Agent, tool
from strands.types.content import ContentBlock

from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server

# In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), OllamaModel(...)
MODEL = ScriptedModel(
    [
        {"tool": "calculator", "input": {"left": 12, "operation": "*", "right": 34}},
        "12 times 34 is 408.",
    ]
)
SESSION_ID = f"calculator-{uuid4().hex[:8]}"


@tool
def calculator(left: float, operation: Literal["+", "-", "*", "/"], right: float) -> float:
    """Calculate with two numbers.

    Args:
        left: The first number.
        operation: The operation.
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


def describe(block: ContentBlock) -> str:
    """Return a content block as one line of text."""
    if "toolUse" in block:
        return f"calls {block['toolUse']['name']} with {block['toolUse']['input']}"
    if "toolResult" in block:
        return f"gets {block['toolResult']['content'][0]['text']}"
    return block["text"].strip()


def main() -> None:
    """Calculate with one agent, and restore the conversation with another."""
    connection_string = demo_server()
    with MongoDBSessionManager(SESSION_ID, connection_string) as session:
        agent = Agent(model=MODEL, tools=[calculator], session_manager=session, callback_handler=None)
        print("answer:", str(agent("What is 12 times 34? Use the calculator.")).strip())

    with MongoDBSessionManager(SESSION_ID, connection_string) as session:
        agent = Agent(model=MODEL, tools=[calculator], session_manager=session, callback_handler=None)
        print(f"restored {len(agent.messages)} messages:")
        for message in agent.messages:
            for block in message["content"]:
                print(f"  {message['role']}: {describe(block)}")


if __name__ == "__main__":
    main()
