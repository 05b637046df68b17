"""How deep the calls of a live turn go: whoever reads the code from `apply` on soon arrives at the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorCollection

import mongodb_session_manager as package
from mongodb_session_manager import MongoDBSessionManagerFactory
from support import agent

SOURCE = str(Path(package.__file__).parent)


def own_frames() -> list[str]:
    """The functions of the package that are running, the outermost first; those that await the next one, too."""
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]
    return found[::-1]


@pytest.mark.parametrize("limits", [{}, {"max_embedded_messages": 4}], ids=["short", "archived"])
def test_from_apply_to_the_command_of_a_live_turn_are_six_calls(
    factory: MongoDBSessionManagerFactory, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any]
) -> None:
    chains = []
    original = AsyncIOMotorCollection.update_one

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        chains.append(own_frames())
        return original(self, *args, **kwargs)

    with factory.create_session_manager("s", **limits) as manager:
        live = agent(manager, *["answer"] * 6)
        live("question")
        monkeypatch.setattr(AsyncIOMotorCollection, "update_one", noting)
        for _ in range(5):
            live("question")
    turns = [
        chain[chain.index("ConversationMethods._apply") :] for chain in chains if "ConversationMethods._apply" in chain
    ]
    assert len(turns) >= 10
    assert max(turns, key=len) == [
        "ConversationMethods._apply",
        "Writer.apply",
        "Flush.store",
        "Expiry.update",
        "Collection.send",
        "matched",
    ]
