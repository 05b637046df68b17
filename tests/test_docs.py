"""The documentation says what happens: its blocks run, its commands exist, and its site builds."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from blockbuster import BlockBuster

import interpreter
from documented import PAGES, ROOT, Program, blocks, uri_of

WITH_AWS = {
    "migrating/from-strands.md",
    "user-guide/aws.md",
}  # run by tests/aws, beside a server that does what AWS does
WITH_AG_UI = {"user-guide/ag-ui.md"}
SHOWS_INDEXES = {"user-guide/operations.md"}
NOT_RUN = {"user-guide/operations.md": 1, "user-guide/other-frameworks.md": 1}

ALL = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))
PROGRAMS = [page for page in ALL if blocks(PAGES / page) and page not in WITH_AWS]


@pytest.fixture(autouse=True)
def others_may_block(blocking_calls_are_errors: BlockBuster) -> None:
    """Let Strands look for its directory of tools, and a client of a page's own describe its machine."""
    for call in ("os.getcwd", "os.stat"):
        blocking_calls_are_errors.functions[call].can_block_in("strands/tools/registry.py", "get_tools_dirs")
        blocking_calls_are_errors.functions[call].can_block_in("pymongo/pool_options.py", "_metadata_env")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.own_database) if page in SHOWS_INDEXES else page for page in PROGRAMS],
)
def test_every_block_of_a_page_runs(
    page: str,
    server: str,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if page in WITH_AG_UI:
        pytest.importorskip("ag_ui_strands", reason="needs ag-ui-strands, of the extra test")
    Program(PAGES / page, uri_of(server, database), tmp_path, monkeypatch).run(capsys)


def test_there_are_pages_that_run() -> None:
    assert len(PROGRAMS) > 20
    assert {page for page in ALL if blocks(PAGES / page)} == {*PROGRAMS, *WITH_AWS}
    fences = sum(path.read_text().count("```python\n") for path in PAGES.rglob("*.md"))
    assert sum(len(blocks(PAGES / page)) for page in ALL) == fences


def test_blocks_that_are_not_run_are_few_and_known() -> None:
    counted = {page: sum(block.not_run is not None for block in blocks(PAGES / page)) for page in ALL}
    assert {page: count for page, count in counted.items() if count} == NOT_RUN


# Commands.

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = [
    pytest.param(line, id=f"{page}:{block.line + number}")
    for page in ALL
    for block in blocks(PAGES / page, "bash")
    for number, line in enumerate(block.code.splitlines())
    if line and not line.startswith("#")
]
OTHER_PACKAGES = {
    *("ag-ui-strands", "litestar", "motor", "opentelemetry-instrumentation-pymongo", "opentelemetry-sdk"),
    *("python-multipart", "starlette", "uvicorn"),
}
EXAMPLES = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_given(command: str) -> None:
    for part in command.partition("  #")[0].split(" && "):
        words = [word.strip("'\"") for word in part.split()]
        match words:
            case ["pip", "install", *requirements]:
                for requirement in requirements:
                    check_requirement(requirement)
            case ["python", "-m", module, *options]:
                check_module(module, options)
            case ["python", script, *_]:
                assert script in EXAMPLES or (ROOT / script).is_file()
            case ["mkdocs", "build" | "serve", "-f", "docs/mkdocs.yml", *_]:
                assert (ROOT / "docs" / "mkdocs.yml").is_file()
            case ["uvicorn", application, "--workers", _]:
                assert f"{application.removesuffix(':app')}.py" in EXAMPLES
            case ["curl", *_]:
                assert any(f"    {part}\n" in source for source in EXAMPLES.values())  # run by test_examples_run.py
            case ["export", _]:
                assert re.fullmatch(r"[A-Z_]+=\S+", words[1])
            case _:
                pytest.fail(f"nobody knows if this works: {part}")


def check_requirement(requirement: str) -> None:
    name, _, extras = requirement.removesuffix("]").partition("[")
    if requirement == "-e" or name in OTHER_PACKAGES:
        return
    assert name in (METADATA["name"], ".")
    assert {extra for extra in extras.split(",") if extra} <= METADATA["optional-dependencies"].keys()


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """Ask a module for its options: most of the commands run until they are stopped, or take long."""
    code = f"import runpy, sys; sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__')"
    shown, _ = interpreter.run(code, "--help")
    return frozenset(re.findall(r"--[a-z-]+", shown))


def check_module(module: str, options: list[str]) -> None:
    assert {option for option in options if option.startswith("--")} <= options_of(module)


# What pages name.

INCLUDED = re.compile(r'^ *--8<-- "([^"]+?)(?::\w+)*"$', re.MULTILINE)


def test_files_of_the_repository_that_pages_name_are_there() -> None:
    missing = []
    for page in ALL:
        text = (PAGES / page).read_text()
        named = re.findall(r"`((?:benchmarks|docs|examples|src|tests)/[\w./-]*)`", text) + INCLUDED.findall(text)
        missing += [(page, name) for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_modules_that_the_map_for_contributors_names_are_there() -> None:
    named = re.findall(r"`((?:_?[a-z]+/)?[\w]+\.py|_[a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    package = ROOT / "src" / "mongodb_session_manager"
    assert len(named) > 20
    assert [name for name in named if not (package / name).exists() and not (ROOT / name).exists()] == []


def test_every_example_is_shown() -> None:
    shown = INCLUDED.findall((PAGES / "examples.md").read_text())
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "docs" / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"[\w/-]+\.md", config.partition("\nnav:")[2])) == ALL


# The site.


def has_mkdocs() -> bool:
    try:
        return bool(importlib.metadata.version("mkdocs-material") and importlib.metadata.version("mkdocstrings-python"))
    except importlib.metadata.PackageNotFoundError:
        return False


MKDOCS = """
import gc, sys
gc.disable()
sys.modules["ruff"] = None  # mkdocstrings starts it for each signature, only to break lines
from mkdocs.__main__ import cli
cli()
"""


@pytest.mark.skipif(not has_mkdocs(), reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_builds_and_asks_nobody_else_for_anything(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-c", MKDOCS, "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?\b(?:src|href)="?(https?://[^" >]+)', page.read_text())
        assert [url for url in loaded if "localhost" not in url] == [], page
