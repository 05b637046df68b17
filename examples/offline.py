"""What the examples share: they run offline, and with a real model or server by one option each.

On its own it runs nothing. `--model bedrock:us.anthropic.claude-sonnet-4-20250514-v1:0` takes a real model in the place
of the scripted one; `bedrock`, `openai` and `anthropic` are known, with credentials from where each looks for them (and
`pip install 'strands-agents[openai]'` or `'strands-agents[anthropic]'`). MONGODB_URI names a real server in the place
of the embedded one.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from strands.models import Model

from mongodb_session_manager.demo import Reply, ScriptedModel
from mongodb_session_manager.embedded import EmbeddedMongoDB

PROVIDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bedrock": ("strands.models.bedrock", "BedrockModel", {}),
    "openai": ("strands.models.openai", "OpenAIModel", {}),
    "anthropic": ("strands.models.anthropic", "AnthropicModel", {"max_tokens": 1024}),
}


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the option that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=_model_name, default="scripted", help="like openai:gpt-4o (default: scripted)")
    return parser


def _model_name(value: str) -> str:
    provider, _, model_id = value.partition(":")
    if value != "scripted" and not (provider in PROVIDERS and model_id):
        raise argparse.ArgumentTypeError(f"not PROVIDER:MODEL_ID with a provider of {', '.join(PROVIDERS)}")
    return value


def make_model(name: str, script: Iterable[Reply] = (), *, delay: float = 0.0, **settings: Any) -> Model:
    """Return the model that `--model` names.

    Args:
        name: What `--model` says.
        script: What the scripted one answers.
        delay: Seconds it waits before each chunk.
        **settings: For a real one.
    """
    if name == "scripted":
        return ScriptedModel(script, delay=delay)
    provider, _, model_id = name.partition(":")
    module, class_name, defaults = PROVIDERS[provider]
    model: Model = getattr(importlib.import_module(module), class_name)(model_id=model_id, **defaults, **settings)
    return model


@contextmanager
def mongodb(data_directory: str | None = None) -> Iterator[str]:
    """Have MONGODB_URI name a server, an embedded one if it names none; session managers read it.

    The embedded one's data is gone with it, unless there is a directory for it.
    """
    if uri := os.environ.get("MONGODB_URI"):
        yield uri
        return
    with EmbeddedMongoDB(data_directory=data_directory) as server:
        os.environ["MONGODB_URI"] = server.connection_string
        try:
            yield server.connection_string
        finally:
            del os.environ["MONGODB_URI"]


def new_session_id(name: str) -> str:
    """Return the id of a session that does not exist yet."""
    return f"{name}-{uuid4().hex[:8]}"
