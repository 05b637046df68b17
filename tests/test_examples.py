"""What README and examples show, run as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from mongodb_session_manager import close_global_factory
from scripted_model import ScriptedModel

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(block: str, uri: str, database: str) -> dict[str, Any]:
    """Execute a block of the README on the test's server and with a scripted model."""
    block = block.replace('"mongodb://localhost:27017/support"', f'"{uri}", "{database}"')
    block = block.replace("Agent(session_manager=", "Agent(model=model(), session_manager=")
    namespace: dict[str, Any] = {"model": ScriptedModel}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_every_block_of_the_readme_is_run_here() -> None:
    assert len(BLOCKS) == 4  # the one on AWS by tests/aws


def test_sync_quick_start(server: str, database: str) -> None:
    run(BLOCKS[0], server, database)
    resumed = run(BLOCKS[0], server, database)["agent"]
    assert [message["role"] for message in resumed.messages] == ["user", "assistant"] * 2


@pytest.mark.anyio
async def test_fastapi_quick_start(server: str, database: str) -> None:
    app = run(BLOCKS[1], server, database)["app"]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        await client.post("/sessions/s/messages", params={"text": "Hello, my name is Ada."})
        answer = await client.post("/sessions/s/messages", params={"text": "What is my name?"})
    assert answer.text.strip() == "Your name is Ada."
    await asyncio.to_thread(close_global_factory)


def test_metadata_and_feedback(server: str, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(BLOCKS[2], server, database)
    shown = capsys.readouterr().out
    assert shown.startswith("ada-1: metadata update\nada-1: metadata get\n")
    assert "{'metadata': {'customer': 'Ada', 'preferences': {'language': 'en'}}}" in shown
    assert "'comment': 'quick'" in shown


def test_quickstart_example(server: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MONGODB_URI"}
    shown = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "quickstart.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert "(restored 2 messages)" in shown.stdout
    assert "agent: Your name is Ada." in shown.stdout
