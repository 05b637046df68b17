"""Metadata and feedback of a session that is not opened: the methods of a factory, which go through its hooks."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mongodb_session_manager import InvalidArgumentError, MongoDBSessionManagerFactory, SessionNotFoundError
from support import CommandLog, alternating, eventually

CALLS: dict[str, dict[str, Any]] = {
    "get_metadata": {},
    "update_metadata": {"metadata": {"a.b": 2}},
    "delete_metadata": {"keys": ["a.b"]},
    "add_feedback": {"feedback": {"rating": "up"}},
}


@pytest.fixture(params=alternating("", "_async"), ids=["blocking", "async"])
def call(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Call a method of a factory, or its asynchronous twin."""
    with asyncio.Runner() as runner:

        async def awaited(result: Any) -> Any:
            return await result

        def run(factory: MongoDBSessionManagerFactory, name: str, *args: Any, **kwargs: Any) -> Any:
            result = getattr(factory, name + request.param)(*args, **kwargs)
            return runner.run(awaited(result)) if inspect.isawaitable(result) else result

        yield run


@pytest.fixture
def called() -> list[Any]:
    return []


@pytest.fixture(params=alternating("def", "async def"))
def hooked(
    request: pytest.FixtureRequest, server: str, database: str, commands: CommandLog, called: list[Any]
) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory with a hook that does not always call `original_func`, as one with a cache does."""

    def hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any:
        called.append((action, session_id, kwargs))
        if kwargs.get("metadata") == {"a.b": 2}:
            kwargs["metadata"] = {"a.b": 3}
        return original_func(**kwargs)

    async def async_hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any:
        return await hook(original_func, action, session_id, **kwargs)

    given = hook if request.param == "def" else async_hook
    with MongoDBSessionManagerFactory(
        server, database, metadata_hook=given, feedback_hook=given, event_listeners=[commands]
    ) as factory:
        with factory.create_session_manager(
            "s", owner="ada", metadata_hook=lambda original, *_, **k: original(**k)
        ) as s:
            s.update_metadata({"a": {"b": 1}})
        eventually(lambda: not factory._connection._tasks)
        commands.clear()
        yield factory


def test_without_hooks_each_call_is_one_command(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, call: Callable[..., Any]
) -> None:
    factory.create_session_manager("s", owner="ada").close()
    for name, arguments in CALLS.items():
        commands.clear()
        call(factory, name, "s", **arguments, owner="ada")
        assert len(commands.names) == 1, name
    assert factory.get_metadata("s") == {"metadata": {"a": {}}}
    assert [entry["rating"] for entry in factory.get_feedbacks("s", owner="ada")] == ["up"]


def test_the_hooks_of_the_factory_are_called(
    hooked: MongoDBSessionManagerFactory, call: Callable[..., Any], called: list[Any]
) -> None:
    assert call(hooked, "get_metadata", "s", owner="ada") == {"metadata": {"a": {"b": 1}}}
    call(hooked, "update_metadata", "s", {"a.b": 2}, owner="ada")
    assert call(hooked, "get_metadata", "s") == {"metadata": {"a": {"b": 3}}}
    call(hooked, "delete_metadata", "s", ["a"])
    call(hooked, "add_feedback", "s", {"rating": "up"})
    assert called == [
        ("get", "s", {}),
        ("update", "s", {"metadata": {"a.b": 3}}),
        ("get", "s", {}),
        ("delete", "s", {"keys": ["a"]}),
        ("add", "s", {"feedback": {"rating": "up"}}),
    ]


def test_no_hook_is_called_for_a_session_of_another(
    hooked: MongoDBSessionManagerFactory, commands: CommandLog, call: Callable[..., Any], called: list[Any]
) -> None:
    """A hook can act before the database is asked whose session it is, or not ask it at all."""
    for name, session_id in itertools.product(CALLS, ("s", "absent")):
        commands.clear()
        if name == "get_metadata":
            assert call(hooked, name, session_id, owner="bob") == {}
        else:
            with pytest.raises(SessionNotFoundError, match=f"session '{session_id}' does not exist"):
                call(hooked, name, session_id, **CALLS[name], owner="bob")
        assert commands.names == ["find"], name
    assert called == []


def test_bad_arguments_are_refused_before_the_hook(
    hooked: MongoDBSessionManagerFactory, commands: CommandLog, call: Callable[..., Any], called: list[Any]
) -> None:
    wrong: list[tuple[Any, ...]] = [
        ("get_metadata", {"$ne": 1}),
        ("update_metadata", "s", {"$set": 1}),
        ("delete_metadata", "s", "key"),
        ("add_feedback", "s", "good"),
    ]
    for name, *arguments in wrong:
        with pytest.raises(InvalidArgumentError):
            call(hooked, name, *arguments)
    with pytest.raises(InvalidArgumentError, match="owner must not be empty"):
        call(hooked, "add_feedback", "s", {"rating": "up"}, owner="")
    assert (commands.names, called) == ([], [])
