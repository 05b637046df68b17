"""What README and examples show, run as it stands there."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from documented import README, Program, blocks, uri_of


@pytest.fixture
def readme(server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(README, uri_of(server, database), tmp_path, monkeypatch)


def test_every_block_of_the_readme_is_run_here() -> None:
    assert len(blocks(README)) == 4  # the one on AWS by tests/aws


def test_sync_quick_start(readme: Program) -> None:
    readme.run_block(0)
    resumed = readme.run_block(0)["agent"]
    assert [message["role"] for message in resumed.messages] == ["user", "assistant"] * 2


@pytest.mark.anyio
@pytest.mark.may_block  # Strands looks for its directory of tools when an endpoint makes an agent
async def test_fastapi_quick_start(readme: Program) -> None:
    app = readme.run_block(1)["app"]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        await client.post("/sessions/s/messages", params={"text": "Hello, my name is Ada."})
        answer = await client.post("/sessions/s/messages", params={"text": "What is my name?"})
        missing = await client.post("/sessions/a%00b/messages", params={"text": "hi"})
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert "".join(told[:-1]).strip() == "Your name is Ada."
    assert told[-1] == {"stop_reason": "end_turn"}
    assert missing.status_code == 422


def test_metadata_and_feedback(readme: Program, capsys: pytest.CaptureFixture[str]) -> None:
    readme.run_block(2)
    shown = capsys.readouterr().out
    assert shown.startswith("ada-1: metadata update\nada-1: metadata get\n")
    assert "{'metadata': {'customer': 'Ada', 'preferences': {'language': 'en'}}}" in shown
    assert "'comment': 'quick'" in shown
