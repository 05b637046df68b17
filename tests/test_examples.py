"""The README's programs run as they are, and so does every block of the first pages of the documentation."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from documented import EXAMPLE_URI, PAGES, README, Program, blocks, uri_of

FIRST_PAGES = [README, PAGES / "index.md", *sorted((PAGES / "getting-started").glob("*.md"))]


@pytest.fixture
def readme(server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(README, uri_of(server, database), tmp_path, monkeypatch)


def test_every_block_of_the_readme_is_run_here() -> None:
    assert len(blocks(README)) == 4


def test_the_readme_has_no_link_that_breaks_on_a_package_index() -> None:
    links = re.findall(r"\]\(([^)]*)\)", README.read_text())
    assert [link for link in links if not link.startswith("https://")] == []


def test_every_block_of_the_first_pages_can_be_copied_alone(tmp_path: Path) -> None:
    for page in FIRST_PAGES:
        for block in blocks(page):
            (tmp_path / f"{page.stem}_{block.line}.py").write_text(block.code)
            assert EXAMPLE_URI not in block.code
            assert all("model=" in call for call in re.findall(r"\bAgent\(.*", block.code))
    assert len(list(tmp_path.iterdir())) > 12
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    checked = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "All checks passed!\n")


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"`([\w/.-]+(?:\.md|/))`", README.read_text())
    root, pages = README.parent, README.parent / "docs" / "pages"
    assert [name for name in named if not (root / name).exists() and not (pages / name).exists()] == []
    assert len(named) > 15


def test_quick_start(readme: Program, capsys: pytest.CaptureFixture[str]) -> None:
    readme.run_block(0)
    assert capsys.readouterr().out.strip() == "Hello! I have been sent 1 message."
    readme.run_block(0)
    assert capsys.readouterr().out.strip() == "Your name is Ada."


@pytest.mark.anyio
@pytest.mark.may_block  # Strands looks for its directory of tools when an endpoint makes an agent
async def test_fastapi(readme: Program) -> None:
    app = readme.run_block(1)["app"]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
    ):
        commands = re.findall(r"^curl -N .+$", README.read_text(), re.MULTILINE)
        [said, asked] = [shlex.split(command)[2:5:2] for command in commands]
        await client.post(said[0], json=json.loads(said[1]))
        answer = await client.post(asked[0], json=json.loads(asked[1]))
        refused = await client.post("/sessions/a%00b/messages", json={"text": "hi"})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert "".join(events[:-1]).strip() == "Your name is Ada."
    assert events[-1] == {"stop_reason": "end_turn"}
    assert refused.status_code == 422


@pytest.mark.may_block  # Strands, as above
def test_asynchronous_code(readme: Program, capsys: pytest.CaptureFixture[str]) -> None:
    readme.run_block(2)
    assert capsys.readouterr().out.split("\n\n") == [
        "Hello! I have been sent 1 message.",
        "{'metadata': {'customer': 'Ada'}}\n",
    ]


@pytest.mark.may_block  # PyMongo reads about its machine when a client is made
def test_a_client_of_pymongo(readme: Program, capsys: pytest.CaptureFixture[str]) -> None:
    readme.run_block(3)
    assert capsys.readouterr().out == "{'metadata': {}}\n"
