"""Pages of documentation as programs: their blocks, run from top to bottom as they stand there.

A page is one program: its ```python blocks share a namespace and an event loop, and may `await` at their top level.
A ```text or ```json block right behind one is what it prints; `...` stands for anything, and a date, a tracking id, an
ObjectId or a duration for any other; a time to the first byte is there only if it is a millisecond or more. HTML
comments right before a block, which readers do not see, say what else there is to know:

    <!-- model: ["Hello.", {"tool": "add", "input": {"a": 1, "b": 2}}] -->     what the model is to say next
    <!-- not run: it needs ... -->                                              why it cannot run here
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import json
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mongodb_session_manager import close_global_factory
from mongodb_session_manager.demo import Redaction, ScriptedModel

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"
README = ROOT / "README.md"
EXAMPLE_URI = "mongodb://localhost:27017/support"

_BLOCK = re.compile(
    r"(?P<comments>(?:<!-- .*? -->\n+)*)^```(?P<language>python|bash)\n(?P<code>.*?)^```$"
    r"(?:\n\n```(?:text|json)\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
_VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b\d\.\d{6,}(?:e-\d+)?|\b[0-9a-f]{24}\b"
)
_QUICK = re.compile(r',\s*"timeToFirstByteMs": \d+')
_COMMENT = re.compile(r"<!-- (model|not run): (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        language: `"python"` or `"bash"`.
        code: What it holds.
        line: Where in the page its code begins.
        output: What it is said to print, `None` if nothing is said.
        replies: What the model is to say next.
        not_run: Why it cannot run here.
    """

    language: str
    code: str
    line: int
    output: str | None
    replies: list[Any]
    not_run: str | None


def blocks(page: Path, language: str = "python") -> list[Block]:
    """Return the blocks of a page in one language."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        told = dict(_COMMENT.findall(match["comments"]))
        replies = [_reply(reply) for reply in json.loads(told.get("model", "[]"))]
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], match["code"], line, match["output"], replies, told.get("not run")))
    return [block for block in found if block.language == language]


def _reply(reply: Any) -> Any:
    return Redaction(reply["redacted"]) if isinstance(reply, dict) and "redacted" in reply else reply


def uri_of(server: str, database: str) -> str:
    """Return the connection string of a server with the name of a database in it."""
    parts = urlsplit(server)
    query = parts.query if "@" not in parts.netloc or "authSource" in parts.query else f"{parts.query}&authSource=admin"
    return f"{parts.scheme}://{parts.netloc}/{database}?{query}"


class Program:
    """A page that runs on a server of the tests, in a directory of its own and with a scripted model.

    Attributes:
        names: What its blocks have defined.
    """

    def __init__(self, page: Path, uri: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._page, self._uri = page, uri
        self.names: dict[str, Any] = {"__name__": "documentation"}
        self._replies: deque[Any] = deque()
        monkeypatch.chdir(directory)
        monkeypatch.setenv("MONGODB_URI", uri)
        monkeypatch.setattr("strands.agent.agent.BedrockModel", self._model)

    def _model(self, model_id: str = "scripted") -> ScriptedModel:
        """Return the model of an agent that was given none."""
        model = ScriptedModel(model_id=model_id)
        model.replies = self._replies
        return model

    def run(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Run every block, and compare what it prints with what it is said to print."""
        try:
            with asyncio.Runner() as runner:
                for block in blocks(self._page):
                    if block.not_run is None:
                        capsys.readouterr()
                        self._replies.extend(block.replies)
                        self._run(block, runner)
                        assert not self._replies, f"{self._page}:{block.line}: the model was not asked for all of it"
                        self._compare(block, capsys.readouterr().out)
        finally:
            close_global_factory()

    def run_block(self, number: int) -> dict[str, Any]:
        """Run one block, which does not await at its top level, and return what is defined."""
        exec(self._compiled(blocks(self._page)[number]), self.names)
        return self.names

    def _run(self, block: Block, runner: asyncio.Runner) -> None:
        code = self._compiled(block)
        if code.co_flags & inspect.CO_COROUTINE:

            async def main() -> None:
                await eval(code, self.names)

            runner.run(main())
        else:
            exec(code, self.names)

    def _compiled(self, block: Block) -> Any:
        # On the lines that it has in the page, for tracebacks.
        source = "\n" * (block.line - 1) + block.code.replace(EXAMPLE_URI, self._uri)
        return compile(source, self._page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)

    def _compare(self, block: Block, printed: str) -> None:
        if block.output is None:
            return
        printed = "\n".join(line.rstrip() for line in printed.strip().splitlines()) + "\n"
        expected, found = (_VOLATILE.sub("<volatile>", _QUICK.sub("", text)) for text in (block.output, printed))
        assert doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS), (
            f"{self._page}:{block.line} prints\n{printed}\nand not\n{block.output}"
        )
