"""Users' hooks: what they are called with, where they run, and what they can do to an operation."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import pytest
from anyio._core._eventloop import current_async_library
from pymongo.collection import Collection

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    ConfigurationError,
    EventLoopError,
    InvalidArgumentError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    chain_hooks,
)
from mongodb_session_manager._managers import hook_threads, user_hooks
from support import CommandLog, Session, alternating, with_managers

Stored = Collection[dict[str, Any]]
Hook = Callable[..., Any]
WithEach = Callable[[dict[str, Any]], Iterator[tuple[Any, Session]]]

IO_THREAD = "mongodb-session-manager-io"

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Refused(Exception):
    """What a hook of the user raises."""


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param)


def written_def(inner: Callable[..., Any]) -> Hook:
    def hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any:
        steps = inner(action, session_id, **kwargs)
        arguments = next(steps)
        if arguments is None:
            return "prevented"
        return steps.send(original_func(*arguments))

    return hook


def written_async_def(inner: Callable[..., Any]) -> Hook:
    async def hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any:
        steps = inner(action, session_id, **kwargs)
        arguments = next(steps)
        if arguments is None:
            return "prevented"
        return steps.send(await original_func(*arguments))

    return hook


class PlainCallable:
    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)

    def method(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)


class AsyncCallable(PlainCallable):
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._hook(*args, **kwargs)

    async def method(self, *args: Any, **kwargs: Any) -> Any:
        return await self._hook(*args, **kwargs)


def ignoring(hook: Hook) -> Hook:
    """Return a hook that takes one argument more, to be bound by `functools.partial`."""
    if inspect.iscoroutinefunction(hook):

        async def longer(bound: str, *args: Any, **kwargs: Any) -> Any:
            assert bound == "bound"
            return await hook(*args, **kwargs)
    else:

        def longer(bound: str, *args: Any, **kwargs: Any) -> Any:
            assert bound == "bound"
            return hook(*args, **kwargs)

    return longer


FORMS: dict[str, Callable[[Callable[..., Any]], Hook]] = {
    "def": written_def,
    "async def": written_async_def,
    "object": lambda inner: PlainCallable(written_def(inner)),
    "async object": lambda inner: AsyncCallable(written_async_def(inner)),
    "method": lambda inner: PlainCallable(written_def(inner)).method,
    "async method": lambda inner: AsyncCallable(written_async_def(inner)).method,
    "partial": lambda inner: functools.partial(ignoring(written_def(inner)), "bound"),
    "async partial": lambda inner: functools.partial(ignoring(written_async_def(inner)), "bound"),
    "partial of object": lambda inner: functools.partial(PlainCallable(written_def(inner))),
    "partial of async object": lambda inner: functools.partial(AsyncCallable(written_async_def(inner))),
}
NO_DEADLOCK = pytest.mark.timeout(60)
BOTH = pytest.mark.parametrize("form", alternating(written_def, written_async_def), ids=["def", "async def"])


@pytest.fixture
def with_each(
    factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, some: Callable[..., list[Any]], stored: Stored
) -> WithEach:
    """Return a function that yields each form of a hook with a new session; see `with_managers`."""

    def sessions(forms: dict[str, Any]) -> Iterator[tuple[Any, Session]]:
        for form, session in with_managers(forms.values(), factory, runner, some):
            stored.delete_one({"_id": "s"})
            yield form, session

    return sessions


# What a hook does is a generator, so that `def` and `async def` can do the same: it yields the positional arguments
# for `original_func`, or None so as not to call it, and then gets the result and yields what the caller gets.


def transparent(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
    result = yield list(kwargs.values())
    yield result


# What a hook is called with.


def test_actions_and_arguments(with_each: WithEach, stored: Stored) -> None:
    calls: list[Any] = []

    def note(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        calls.append((action, session_id, kwargs))
        result = yield list(kwargs.values())
        calls.append(result)
        yield result

    for form, session in with_each(FORMS):
        calls.clear()
        session.open(metadata_hook=form(note), feedback_hook=form(note))
        session.update_metadata({"a.b": 1, "c": 2})
        assert session.get_metadata() == {"metadata": {"a": {"b": 1}, "c": 2}}
        session.delete_metadata(["c"])
        session.add_feedback({"rating": "up"})
        assert calls == [
            ("update", "s", {"metadata": {"a.b": 1, "c": 2}}),
            None,
            ("get", "s", {}),
            {"metadata": {"a": {"b": 1}, "c": 2}},
            ("delete", "s", {"keys": ["c"]}),
            None,
            ("add", "s", {"feedback": {"rating": "up"}}),
            None,
        ]
        document = stored.find_one({"_id": "s"})
        assert document["metadata"] == {"a": {"b": 1}}
        assert [entry["rating"] for entry in document["feedbacks"]] == ["up"]
        assert [entry["rating"] for entry in session.get_feedbacks()] == ["up"]
        assert len(calls) == 8


def test_original_func_takes_its_argument_by_name(session: Session) -> None:
    def hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any:
        return original_func(**kwargs)

    session.open(metadata_hook=hook, feedback_hook=hook)
    session.update_metadata({"a": 1})
    session.delete_metadata(["b"])
    session.add_feedback({"rating": "up"})
    assert session.get_metadata() == {"metadata": {"a": 1}}
    assert len(session.get_feedbacks()) == 1


@BOTH
def test_a_hooked_call_costs_what_it_costs_without(
    session: Session, form: Callable[..., Hook], commands: CommandLog
) -> None:
    session.open(metadata_hook=form(transparent), feedback_hook=form(transparent))
    commands.clear()
    session.update_metadata({"a": 1})
    session.get_metadata()
    session.delete_metadata(["a"])
    session.add_feedback({"rating": "up"})
    assert commands.names == ["update", "find", "update", "update"]


# What a hook can do.


@BOTH
def test_a_hook_that_does_not_call_original_prevents_the_operation(
    session: Session, form: Callable[..., Hook], stored: Stored
) -> None:
    def prevent(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        yield None

    session.open().update_metadata({"kept": 1})
    session.open(metadata_hook=form(prevent), feedback_hook=form(prevent))
    before = stored.find_one({"_id": "s"})
    assert session.update_metadata({"a": 1}) == "prevented"
    assert session.delete_metadata(["kept"]) == "prevented"
    assert session.get_metadata() == "prevented"
    assert session.add_feedback({"rating": "up"}) == "prevented"
    assert stored.find_one({"_id": "s"}) == before


@BOTH
def test_a_hook_changes_the_argument(session: Session, form: Callable[..., Hook], stored: Stored) -> None:
    def change(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        arguments = {
            "update": [{**kwargs.get("metadata", {}), "by": "hook"}],
            "delete": [[*kwargs.get("keys", []), "b"]],
            "add": [{**kwargs.get("feedback", {}), "by": "hook"}],
            "get": [],
        }
        yield (yield arguments[action])

    session.open(metadata_hook=form(change), feedback_hook=form(change))
    given = {"a": 1, "b": 2, "c": 3}
    session.update_metadata(given)
    session.delete_metadata(["a"])
    session.add_feedback({"rating": "up"})
    document = stored.find_one({"_id": "s"})
    assert given == {"a": 1, "b": 2, "c": 3}
    assert document["metadata"] == {"c": 3, "by": "hook"}
    assert [(entry["rating"], entry["by"]) for entry in document["feedbacks"]] == [("up", "hook")]


@BOTH
def test_what_a_hook_hands_on_is_checked_too(
    session: Session, form: Callable[..., Hook], stored: Stored, commands: CommandLog
) -> None:
    def spoil(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        yield (yield [{"update": {"$set": 1}, "delete": "topic", "add": ["up"]}[action]])

    session.open(metadata_hook=form(spoil), feedback_hook=form(spoil))
    commands.clear()
    with pytest.raises(InvalidArgumentError, match="metadata contains the key"):
        session.update_metadata({"a": 1})
    with pytest.raises(InvalidArgumentError, match="keys must be a list"):
        session.delete_metadata(["a"])
    with pytest.raises(InvalidArgumentError, match="feedback must be a dict"):
        session.add_feedback({})
    assert commands.names == []


@BOTH
def test_bad_arguments_are_refused_before_the_hook(session: Session, form: Callable[..., Hook]) -> None:
    calls: list[str] = []

    def note(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        calls.append(action)
        yield None

    session.open(metadata_hook=form(note), feedback_hook=form(note))
    with pytest.raises(InvalidArgumentError, match="metadata"):
        session.update_metadata({"$x": 1})
    with pytest.raises(InvalidArgumentError, match="keys"):
        session.delete_metadata("topic")
    with pytest.raises(InvalidArgumentError, match="feedback"):
        session.add_feedback("up")
    assert calls == []


@BOTH
def test_a_hook_changes_the_result(session: Session, form: Callable[..., Hook]) -> None:
    def change(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        result = yield list(kwargs.values())
        yield {"was": result, "action": action}

    session.open(metadata_hook=form(change), feedback_hook=form(change))
    assert session.update_metadata({"a": 1}) == {"was": None, "action": "update"}
    assert session.get_metadata() == {"was": {"metadata": {"a": 1}}, "action": "get"}
    assert session.delete_metadata(["b"]) == {"was": None, "action": "delete"}
    assert session.add_feedback({}) == {"was": None, "action": "add"}


def test_what_a_hook_raises_reaches_the_caller(with_each: WithEach, stored: Stored, commands: CommandLog) -> None:
    error = Refused("not today")

    def refuse(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        raise error
        yield

    arguments: dict[str, list[Any]] = {
        "update_metadata": [{"a": 1}],
        "delete_metadata": [["a"]],
        "get_metadata": [],
        "add_feedback": [{"rating": "up"}],
    }
    for form, session in with_each(FORMS):
        session.open(metadata_hook=form(refuse), feedback_hook=form(refuse))
        commands.clear()
        for name, given in arguments.items():
            with pytest.raises(Refused) as raised:
                getattr(session, name)(*given)
            assert raised.value is error
        assert commands.names == []
        assert stored.find_one({"_id": "s"})["metadata"] == {}


@BOTH
def test_what_a_hook_raises_afterwards_reaches_the_caller_too(
    session: Session, form: Callable[..., Hook], stored: Stored
) -> None:
    def refuse(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        yield list(kwargs.values())
        raise Refused("too late")

    session.open(metadata_hook=form(refuse))
    with pytest.raises(Refused, match="too late"):
        session.update_metadata({"a": 1})
    assert stored.find_one({"_id": "s"})["metadata"] == {"a": 1}


@BOTH
def test_what_fails_in_the_database_reaches_the_hook(session: Session, form: Callable[..., Hook]) -> None:
    session.open().update_metadata({"a": "text"})
    seen: list[type[BaseException]] = []

    def watch(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        yield list(kwargs.values())

    inner = form(watch)

    if inspect.iscoroutinefunction(inner):

        async def hook(*args: Any, **kwargs: Any) -> Any:
            try:
                return await inner(*args, **kwargs)
            except InvalidArgumentError as error:
                seen.append(type(error))
                return "handled"
    else:

        def hook(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except InvalidArgumentError as error:
                seen.append(type(error))
                return "handled"

    session.open(metadata_hook=hook)
    assert session.update_metadata({"a.b": 1}) == "handled"
    assert seen == [InvalidArgumentError]


# A `def` hook that returns an awaitable.


class Awaitable:
    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Any:
        return self._coroutine.__await__()


class ReturnsCoroutine:
    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)


def wrapped_by_a_def(hook: Hook) -> Hook:
    @functools.wraps(hook)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return wrapper


def awaiting_an_awaitable(hook: Hook) -> Hook:
    async def outer(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return outer


AWAITABLES: dict[str, Callable[[Hook], Hook]] = {
    "lambda": lambda hook: lambda *args, **kwargs: hook(*args, **kwargs),
    "wraps": wrapped_by_a_def,
    "object": ReturnsCoroutine,
    "partial of an object": lambda hook: functools.partial(ReturnsCoroutine(hook)),
    "an awaitable object": lambda hook: lambda *args, **kwargs: Awaitable(hook(*args, **kwargs)),
    "an awaitable of an awaitable": awaiting_an_awaitable,
    "in a chain": lambda hook: chain_hooks(lambda *args, **kwargs: hook(*args, **kwargs)),
    "in a chain with an async def": lambda hook: chain_hooks(written_async_def(transparent), wrapped_by_a_def(hook)),
    "around a chain": lambda hook: wrapped_by_a_def(chain_hooks(hook, written_def(transparent))),
}


def test_what_a_def_hook_returns_is_awaited(with_each: WithEach) -> None:
    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return [action, await original_func(*kwargs.values())]

    for form, session in with_each(AWAITABLES):
        session.open(metadata_hook=form(hook), feedback_hook=form(hook))
        assert session.update_metadata({"a": 1, "b": 2}) == ["update", None]
        assert session.delete_metadata(["b"]) == ["delete", None]
        assert session.get_metadata() == ["get", {"metadata": {"a": 1}}]
        assert session.add_feedback({"rating": "up"}) == ["add", None]
        assert len(session.get_feedbacks()) == 1


def test_what_it_raises_while_it_is_awaited_reaches_the_caller(with_each: WithEach) -> None:
    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        raise Refused("not today")

    for form, session in with_each(AWAITABLES):
        session.open(metadata_hook=form(hook))
        with pytest.raises(Refused, match="not today"):
            session.update_metadata({"a": 1})


@pytest.mark.anyio
async def test_a_future_that_a_def_hook_returns_is_awaited(factory: MongoDBSessionManagerFactory) -> None:
    loop = asyncio.get_running_loop()

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        future: asyncio.Future[str] = loop.create_future()
        result = original_func(*kwargs.values())
        loop.call_soon_threadsafe(future.set_result, f"{action} {result}")
        return future

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    assert await manager.update_metadata({"a": 1}) == "update None"
    other = await asyncio.to_thread(factory.create_session_manager, "s", metadata_hook=hook)
    assert await asyncio.to_thread(other.update_metadata, {"a": 2}) == "update None"


@NO_DEADLOCK
@pytest.mark.may_block
@pytest.mark.anyio
async def test_a_future_of_the_loop_that_a_sync_manager_blocks_is_an_error(
    factory: MongoDBSessionManagerFactory,
) -> None:
    futures: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        original_func(*kwargs.values())
        futures.append(asyncio.get_running_loop().create_future())
        return futures[0]

    manager = factory.create_session_manager("s", metadata_hook=hook)
    with pytest.raises(EventLoopError, match="would wait for the very event loop it blocks"):
        manager.update_metadata({"a": 1})


@pytest.mark.may_block
def test_an_original_that_a_def_hook_calls_in_a_loop_of_its_own_still_waits(session: Session) -> None:
    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        async def within() -> Any:
            return original_func(*kwargs.values())

        return asyncio.run(within())

    session.open(metadata_hook=hook)
    session.update_metadata({"a": 1})
    assert session.get_metadata() == {"metadata": {"a": 1}}


def test_a_def_hook_may_leave_the_operation_to_a_thread_of_its_own(session: Session) -> None:
    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(original_func, *kwargs.values()).result(30)

    session.open(metadata_hook=hook)
    session.update_metadata({"a": 1})
    assert session.get_metadata() == {"metadata": {"a": 1}}


@pytest.mark.parametrize("other", alternating(written_def, written_async_def))
def test_a_def_hook_in_a_chain_may_leave_the_operation_to_a_thread_of_its_own(
    session: Session, other: Callable[..., Hook]
) -> None:
    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(original_func, *kwargs.values()).result(30)

    session.open(metadata_hook=chain_hooks(hook, other(transparent), hook))
    session.update_metadata({"a": 1})
    assert session.get_metadata() == {"metadata": {"a": 1}}


# Where a hook runs.


def test_def_hook_of_the_sync_manager_runs_on_the_callers_thread(factory: MongoDBSessionManagerFactory) -> None:
    threads: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return original_func(**kwargs)

    factory.create_session_manager("s", metadata_hook=hook).update_metadata({"a": 1})
    assert threads == [threading.current_thread()]


def test_async_def_hook_of_the_sync_manager_runs_on_the_io_loop(factory: MongoDBSessionManagerFactory) -> None:
    places: list[str] = []

    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        places.append(threading.current_thread().name)
        result = await original_func(**kwargs)
        places.append(threading.current_thread().name)
        return result

    factory.create_session_manager("s", metadata_hook=hook).update_metadata({"a": 1})
    assert places == [IO_THREAD, IO_THREAD]


@pytest.mark.anyio
async def test_def_hook_of_the_async_manager_runs_off_every_loop(factory: MongoDBSessionManagerFactory) -> None:
    places: list[str] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        places.append(threading.current_thread().name)
        return original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    await manager.update_metadata({"a": 1})
    assert len(places) == 1
    assert places[0] not in (threading.current_thread().name, IO_THREAD)
    assert await manager.get_metadata() == {"metadata": {"a": 1}}


@pytest.mark.anyio
@pytest.mark.parametrize("combined", [lambda hook: hook, chain_hooks], ids=["alone", "in a chain"])
async def test_async_def_hook_of_the_async_manager_runs_in_the_callers_task(
    factory: MongoDBSessionManagerFactory, combined: Callable[[Hook], Hook]
) -> None:
    tasks: list[Any] = []

    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        tasks.append(asyncio.current_task())
        result = await original_func(**kwargs)
        tasks.append(asyncio.current_task())
        return result

    manager = await factory.create_session_manager_async("s", metadata_hook=combined(hook))
    await manager.update_metadata({"a": 1})
    assert tasks == [asyncio.current_task()] * 2


@pytest.mark.anyio
async def test_a_def_hook_that_waits_does_not_stop_the_loop(factory: MongoDBSessionManagerFactory) -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        entered.set()
        assert may_go_on.wait(30)
        return original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    update = asyncio.ensure_future(manager.update_metadata({"a": 1}))
    assert await asyncio.to_thread(entered.wait, 30)
    assert not update.done()
    assert await (await factory.create_session_manager_async("s")).get_metadata() == {"metadata": {}}
    may_go_on.set()
    await update


def test_context_variables_reach_the_hook(with_each: WithEach) -> None:
    seen: list[str] = []

    def look(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        seen.append(tenant.get())
        yield (yield list(kwargs.values()))

    async def both(manager: AsyncMongoDBSessionManager, name: str) -> None:
        tenant.set(name)
        await manager.update_metadata({"a": 1})
        await manager.add_feedback({})

    for number, (form, session) in enumerate(with_each(FORMS)):
        name = f"tenant {number}"
        session.open(metadata_hook=form(look), feedback_hook=form(look))
        token = tenant.set(name)
        try:
            if session.is_async:
                session.run(both, session.manager, name)
            else:
                session.update_metadata({"a": 1})
                session.add_feedback({})
        finally:
            tenant.reset(token)
        assert seen[-2:] == [name, name]


# A hook that calls the manager it belongs to.


@NO_DEADLOCK
def test_def_hook_of_the_sync_manager_calls_the_manager(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    seen: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "update":
            seen.append(manager.get_metadata())
            manager.add_feedback({"comment": "updated"})
            manager.flush()
        return original_func(**kwargs)

    manager = factory.create_session_manager("s", metadata_hook=hook)
    manager.update_metadata({"a": 1})
    manager.update_metadata({"b": 2})
    assert seen == [{"metadata": {}}, {"metadata": {"a": 1}}]
    assert [entry["comment"] for entry in manager.get_feedbacks()] == ["updated", "updated"]


@NO_DEADLOCK
def test_async_def_hook_of_the_sync_manager_is_told_that_it_cannot_wait(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    errors: list[str] = []

    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        for call in (
            manager.get_metadata,
            lambda: manager.update_metadata({"b": 1}),
            lambda: manager.add_feedback({}),
            manager.get_feedbacks,
            manager.list_agents,
            manager.close,
        ):
            with pytest.raises(EventLoopError) as raised:
                call()
            errors.append(str(raised.value))
        return await original_func(**kwargs)

    manager = factory.create_session_manager("s", metadata_hook=hook)
    manager.update_metadata({"a": 1})
    assert set(errors) == {
        "a synchronous call would wait for the very event loop it blocks: use the asynchronous twin "
        "(AsyncMongoDBSessionManager, create_session_manager_async, ..._async) on this loop"
    }
    assert len(errors) == 6
    assert stored.find_one({"_id": "s"})["metadata"] == {"a": 1}


@NO_DEADLOCK
def test_async_def_hook_of_the_sync_manager_calls_the_manager_in_a_thread(
    factory: MongoDBSessionManagerFactory,
) -> None:
    seen: list[Any] = []

    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "update":
            seen.append(await asyncio.to_thread(manager.get_metadata))
        return await original_func(**kwargs)

    manager = factory.create_session_manager("s", metadata_hook=hook)
    manager.update_metadata({"a": 1})
    assert seen == [{"metadata": {}}]
    assert manager.get_metadata() == {"metadata": {"a": 1}}


@NO_DEADLOCK
@pytest.mark.anyio
async def test_async_def_hook_of_the_async_manager_calls_the_manager(factory: MongoDBSessionManagerFactory) -> None:
    seen: list[Any] = []

    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "update":
            seen.append(await manager.get_metadata())
            await manager.add_feedback({"comment": "updated"})
            await manager.flush()
        return await original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    await manager.update_metadata({"a": 1})
    await manager.update_metadata({"b": 2})
    assert seen == [{"metadata": {}}, {"metadata": {"a": 1}}]
    assert len(await manager.get_feedbacks()) == 2


def from_the_loop(call: Callable[..., Any]) -> Any:
    return anyio.from_thread.run(call)


def on_a_new_loop(call: Callable[..., Any]) -> Any:
    return asyncio.run(call())


@NO_DEADLOCK
@pytest.mark.anyio
@pytest.mark.parametrize("way", alternating(from_the_loop, on_a_new_loop))
async def test_def_hook_of_the_async_manager_calls_the_manager(
    factory: MongoDBSessionManagerFactory, way: Callable[..., Any]
) -> None:
    seen: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "update":
            seen.append(way(manager.get_metadata))
        return original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    await manager.update_metadata({"a": 1})
    await manager.update_metadata({"b": 2})
    assert seen == [{"metadata": {}}, {"metadata": {"a": 1}}]


@NO_DEADLOCK
@pytest.mark.anyio
@pytest.mark.parametrize("way", [from_the_loop, on_a_new_loop])
async def test_many_def_hooks_of_the_async_manager_call_the_manager_at_once(
    factory: MongoDBSessionManagerFactory, way: Callable[..., Any]
) -> None:
    """As many as the threads that anyio gives, each of which needs another one for the call within it."""
    all_inside = threading.Barrier(40)

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "update":
            all_inside.wait(30)
            way(manager.get_metadata)
        return original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    updates = asyncio.gather(*(manager.update_metadata({f"key{number}": number}) for number in range(40)))
    await asyncio.wait_for(updates, 30)
    assert await manager.get_metadata() == {"metadata": {f"key{number}": number for number in range(40)}}


# Many at once.


@pytest.mark.anyio
@BOTH
async def test_many_hooked_updates_of_the_async_manager(
    factory: MongoDBSessionManagerFactory, form: Callable[..., Hook]
) -> None:
    manager = await factory.create_session_manager_async("s", metadata_hook=form(transparent))
    await asyncio.gather(*(manager.update_metadata({f"key{number}": number}) for number in range(50)))
    assert await manager.get_metadata() == {"metadata": {f"key{number}": number for number in range(50)}}


@BOTH
def test_many_hooked_updates_of_the_sync_manager(
    factory: MongoDBSessionManagerFactory, form: Callable[..., Hook]
) -> None:
    manager = factory.create_session_manager("s", metadata_hook=form(transparent))
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(lambda number: manager.update_metadata({f"key{number}": number}), range(50)))
    assert manager.get_metadata() == {"metadata": {f"key{number}": number for number in range(50)}}


@pytest.mark.anyio
async def test_many_slow_def_hooks_of_the_async_manager_share_a_few_threads(
    factory: MongoDBSessionManagerFactory,
) -> None:
    before = threading.active_count()
    most = 0

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        nonlocal most
        time.sleep(0.01)
        most = max(most, threading.active_count() - before)
        return original_func(**kwargs)

    manager = await factory.create_session_manager_async("s", metadata_hook=hook)
    await asyncio.gather(*(manager.get_metadata() for _ in range(200)))
    assert most < 40 + 100 + 2  # of hooks, of commands, and of nothing else


FATAL = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", FATAL, ids=repr)
@BOTH
def test_whatever_a_hook_raises_other_sessions_go_on(
    session: Session, form: Callable[..., Hook], error: BaseException, factory: MongoDBSessionManagerFactory
) -> None:
    def hook(action: str, session_id: str, **kwargs: Any) -> Iterator[Any]:
        raise error
        yield

    other = factory.create_session_manager("other")
    session.open(metadata_hook=form(hook))
    with pytest.raises(type(error)):
        session.update_metadata({"a": 1})
    other.update_metadata({"a": 1})
    assert other.get_metadata() == {"metadata": {"a": 1}}


# How a hook is given.


def marking(mark: str) -> Hook:
    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        original_func(**kwargs)
        return mark

    return hook


NEW, OLD = ("metadata_hook", "feedback_hook"), ("metadataHook", "feedbackHook")
SPELLINGS = pytest.mark.parametrize("names", [NEW, OLD], ids=["snake", "camel"])


@SPELLINGS
def test_both_spellings_on_both_managers(
    names: tuple[str, str], server: str, database: str, runner: asyncio.Runner
) -> None:
    hooks = {names[0]: marking("metadata"), names[1]: marking("feedback")}
    with MongoDBSessionManager("s", server, database, **hooks) as manager:
        assert manager.update_metadata({"a": 1}) == "metadata"
        assert manager.add_feedback({}) == "feedback"

    async def asynchronously() -> None:
        async with AsyncMongoDBSessionManager("s", server, database, **hooks) as manager:
            assert await manager.update_metadata({"a": 1}) == "metadata"
            assert await manager.add_feedback({}) == "feedback"

    runner.run(asynchronously())


@SPELLINGS
def test_both_spellings_on_the_factory_and_instead_of_its_own(
    names: tuple[str, str], server: str, database: str, runner: asyncio.Runner
) -> None:
    hooks = {names[0]: marking("factory"), names[1]: marking("factory")}
    with MongoDBSessionManagerFactory(server, database, **hooks) as factory:
        for is_async, others in itertools.product((False, True), (NEW, OLD)):
            override, none = {others[0]: marking("own")}, {others[0]: None, others[1]: None}
            session = Session(factory, runner, is_async).open()
            assert (session.update_metadata({"a": 1}), session.add_feedback({})) == ("factory", "factory")
            session = Session(factory, runner, is_async).open(**override)
            assert (session.update_metadata({"a": 1}), session.add_feedback({})) == ("own", "factory")
            session = Session(factory, runner, is_async).open(**none)
            assert (session.update_metadata({"a": 1}), session.add_feedback({})) == ("factory", "factory")


@pytest.mark.parametrize(("snake", "camel"), [*zip(NEW, OLD, strict=True)])
def test_both_spellings_at_once_are_refused(
    factory: MongoDBSessionManagerFactory, server: str, database: str, snake: str, camel: str
) -> None:
    hooks = {snake: marking("one"), camel: marking("other")}
    for make in (
        lambda: MongoDBSessionManager("s", server, database, **hooks),
        lambda: AsyncMongoDBSessionManager("s", server, database, **hooks),
        lambda: MongoDBSessionManagerFactory(server, database, **hooks),
        lambda: factory.create_session_manager("s", **hooks),
    ):
        with pytest.raises(ConfigurationError, match=f"{snake} is passed in both spellings"):
            make()


@pytest.mark.parametrize("name", [*NEW, *OLD])
@pytest.mark.parametrize("hook", ["update"])
def test_what_cannot_be_called_is_no_hook(
    factory: MongoDBSessionManagerFactory, server: str, database: str, commands: CommandLog, name: str, hook: Any
) -> None:
    field = dict(zip(OLD, NEW, strict=True)).get(name, name)
    for make in (
        lambda: MongoDBSessionManager("s", server, database, **{name: hook}),
        lambda: AsyncMongoDBSessionManager("s", server, database, **{name: hook}),
        lambda: MongoDBSessionManagerFactory(server, database, **{name: hook}),
        lambda: factory.create_session_manager("s", **{name: hook}),
    ):
        with pytest.raises(ConfigurationError, match=f"{field} must be a function, not {type(hook).__name__}"):
            make()
    assert commands.names == []


# The first hook of a process.


def test_the_first_def_hook_in_an_application_that_anyio_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # With sniffio, which AnyIO uses if it is installed, a context variable names the library that runs the loop.
    library, running = ContextVar[str | None]("library", default=None), current_async_library
    monkeypatch.setattr("anyio._core._eventloop.current_async_library", lambda: library.get() or running())
    context = copy_context()
    context.run(library.set, "asyncio")
    context.run(importlib.reload, hook_threads)


@pytest.mark.anyio
async def test_a_second_def_hook_does_not_stop_the_loop_while_the_first_imports_anyio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, imported = threading.Event(), threading.Event()

    def run(*_: object) -> None:
        begun.set()
        imported.wait()

    monkeypatch.delitem(sys.modules, hook_threads.__name__)
    monkeypatch.setattr(user_hooks, "_hook_threads", None, raising=False)
    monkeypatch.setattr(anyio, "run", run)
    last_resort = threading.Timer(5, imported.set)
    last_resort.start()
    first = asyncio.create_task(user_hooks._threaded(lambda: 1))
    await asyncio.to_thread(begun.wait)
    second = asyncio.create_task(user_hooks._threaded(lambda: 2))
    await asyncio.sleep(0.01)
    assert not imported.is_set()
    imported.set()
    last_resort.cancel()
    assert await asyncio.gather(first, second) == [1, 2]
