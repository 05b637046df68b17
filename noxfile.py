"""Named targets: `nox -s fast`, `nox -s full`, `nox -s types`, `nox -s docs`, `nox -s bench`, `nox -s 3.12`."""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["fast", "types"]
nox.options.reuse_venv = "yes"


@nox.session
def fast(session: nox.Session) -> None:
    """Run the fast tests: pure ones, and those of one server without killed processes."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-m", "fast", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Run all tests."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Run the formatter, the linter and the type checker."""
    session.install("-e", ".[dev]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    for suite in ("adversity", "aws"):  # one at a time: all have the same name
        session.run("mypy", f"tests/{suite}/conftest.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into the directory `site`."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "-f", "docs/mkdocs.yml")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks; `nox -s bench -- --quick` takes less time."""
    session.install("-e", ".[benchmarks]")
    session.run("python", "-m", "benchmarks", *session.posargs)


def _fast_on(version: str) -> None:
    """Add a session, named like a Python version, that runs the fast tests on it."""

    @nox.session(name=version, python=version)
    def fast_on(session: nox.Session) -> None:
        session.install("-e", ".[test]")
        session.run("python", "-m", "pytest", "-m", "fast", *session.posargs)


for version in ("3.12", "3.13"):
    _fast_on(version)
