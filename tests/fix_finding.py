"""Stored sessions as another application would write them, and what the server reads for a command."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pymongo

Stored = pymongo.collection.Collection[dict[str, Any]]

START = datetime(2026, 1, 1, tzinfo=UTC)


def session(session_id: str, **fields: Any) -> dict[str, Any]:
    """Return the document of a session without agents."""
    return {
        "_id": session_id,
        "session_id": session_id,
        "application_name": None,
        "session_type": "AGENT",
        "created_at": START,
        "updated_at": START,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {},
        **fields,
    }


async def idle(connection: Any) -> None:
    """Wait for the indexes."""
    await asyncio.gather(*connection._tasks)


def cost(database: Any, asked: dict[str, Any]) -> tuple[int, int]:
    """Return how many documents and keys the server looked at for a command."""
    explained = database.command("explain", asked, verbosity="executionStats")
    found = explained.get("stages", [{"$cursor": explained}])[0]["$cursor"]["executionStats"]
    return found["totalDocsExamined"], found["totalKeysExamined"]
