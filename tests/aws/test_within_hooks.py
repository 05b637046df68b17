"""AWS hooks that are called from hooks of the user, of every kind, on both managers."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from arrivals import Queue, Topic
from endpoint import Endpoint, told
from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
    chain_hooks,
    create_feedback_sns_hook,
    create_metadata_sqs_hook,
    create_metadata_websocket_hook,
)
from support import CommandLog, Session, alternating, eventually, with_managers

Hook = Callable[..., Any]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param)


@pytest.fixture
def with_each(
    factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, some: Callable[..., list[Any]], stored: Any
) -> Callable[[Iterable[str]], Iterator[tuple[str, Session]]]:
    """Return a function that yields each name with a new session; see `with_managers`."""

    def sessions(names: Iterable[str]) -> Iterator[tuple[str, Session]]:
        for name, session in with_managers(names, factory, runner, some):
            stored.delete_one({"_id": "s"})
            yield name, session

    return sessions


def called(aws: Hook) -> Hook:
    def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        result = aws(original_func, action, session_id, **argument)
        assert not inspect.isawaitable(result)
        return result

    return hook


def called_for_nothing(aws: Hook) -> Hook:
    def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> None:
        aws(original_func, action, session_id, **argument)

    return hook


def with_an_original_of_its_own(aws: Hook) -> Hook:
    def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        return aws(lambda *value: original_func(*value), action, session_id, **argument)

    return hook


def bound(aws: Hook) -> Hook:
    def hook(given: Hook, *args: Any, **kwargs: Any) -> Any:
        return given(*args, **kwargs)

    return functools.partial(hook, aws)


def wrapped(aws: Hook) -> Hook:
    @functools.wraps(aws)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return aws(*args, **kwargs)

    return hook


class Wrapping:
    def __init__(self, aws: Hook) -> None:
        self._aws = aws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._aws(*args, **kwargs)


def awaited(aws: Hook) -> Hook:
    async def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        return await aws(original_func, action, session_id, **argument)

    return hook


def a_coroutine(aws: Hook) -> Hook:
    inner = awaited(aws)
    return lambda *args, **kwargs: inner(*args, **kwargs)


FORMS: dict[str, Callable[[Hook], Hook]] = {
    "itself": lambda aws: aws,
    "def": called,
    "def that ignores the result": called_for_nothing,
    "def with an original of its own": with_an_original_of_its_own,
    "lambda": lambda aws: lambda *args, **kwargs: aws(*args, **kwargs),
    "partial": functools.partial,
    "partial of a def": bound,
    "wraps": wrapped,
    "object": Wrapping,
    "async def": awaited,
    "def that returns a coroutine": a_coroutine,
    "chain": chain_hooks,
    "chain in a def": lambda aws: called(chain_hooks(aws)),
    "def in a chain in a def": lambda aws: called(chain_hooks(called(aws))),
    "chain with an async def in a def": lambda aws: called(chain_hooks(plain_async, aws)),
    "chain with an async def, dropped": lambda aws: called_for_nothing(chain_hooks(aws, plain_async)),
    "chain with a def in an async def": lambda aws: awaited(chain_hooks(plain, aws)),
    "chain of two in a def": lambda aws: called(chain_hooks(aws, plain)),
}


def plain(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
    result = original_func(**argument)
    assert not inspect.isawaitable(result)
    return result


async def plain_async(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
    return await original_func(**argument)


DISTINCT = ("def", "async def", "def that ignores the result", "chain in a def", "chain with a def in an async def")
"""Forms of which no two call the AWS hook in the same way."""

FORMS_THAT_RETURN_NOTHING = ("def that ignores the result", "chain with an async def, dropped")


def test_metadata_is_stored_and_the_browser_told(
    with_each: Any, endpoint: Endpoint, stored: Any, commands: CommandLog
) -> None:
    endpoint.answers(200)
    websocket = create_metadata_websocket_hook(endpoint.url)
    for name, session in with_each(FORMS):
        endpoint.requests.clear()
        session.open(metadata_hook=FORMS[name](websocket))
        commands.clear()
        session.update_metadata({"connection_id": "c-1", "status": "busy"})
        session.update_metadata({"status": "done"})
        session.delete_metadata(["status"])
        assert commands.names == ["findAndModify"] * 3, name
        read = None if name in FORMS_THAT_RETURN_NOTHING else {"metadata": {"connection_id": "c-1"}}
        assert session.get_metadata() == read, name
        session.close()
        assert stored.find_one({"_id": "s"})["metadata"] == {"connection_id": "c-1"}, name
        assert told(endpoint) == [
            ("c-1", "update", {"status": "busy"}),
            ("c-1", "update", {"status": "done"}),
            ("c-1", "delete", {"status": None}),
        ], name


def test_feedback_is_stored_and_published(
    with_each: Any, moto: str, topic: Topic, request: pytest.FixtureRequest
) -> None:
    sns = create_feedback_sns_hook(topic.arn, "none", "none", endpoint_url=moto)
    names = FORMS if request.config.getoption("--full-adversity") else DISTINCT
    for name, session in with_each(names):
        session.open(feedback_hook=FORMS[name](sns))
        session.add_feedback({"rating": "up", "comment": name})
        assert [feedback["comment"] for feedback in session.get_feedbacks()] == [name]
        session.close()
    assert {message["Message"] for message in topic.arrived()} == {f"Session: s\n\n{name}" for name in names}


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("is_async", alternating(False, True), ids=["def", "async def"])
def test_each_call_is_one_operation_and_one_notification(
    session: Session, moto: str, queue: Queue, commands: CommandLog, is_async: bool, times: int
) -> None:
    sqs = create_metadata_sqs_hook(queue.url, endpoint_url=moto)

    def own(original_func: Any, action: str, session_id: str, **argument: Any) -> None:
        for number in range(times):
            sqs(original_func, action, session_id, metadata={"n": number})

    async def own_async(original_func: Any, action: str, session_id: str, **argument: Any) -> None:
        for number in range(times):
            await sqs(original_func, action, session_id, metadata={"n": number})

    session.open(metadata_hook=own_async if is_async else own)
    commands.clear()
    session.update_metadata({"n": "given"})
    assert commands.names == ["update"] * times
    session.close()
    assert [message.metadata for message in queue.arrived()] == [{"n": number} for number in range(times)]


def test_from_a_thread_of_the_hooks_own(session: Session, endpoint: Endpoint) -> None:
    endpoint.answers(200)
    websocket = create_metadata_websocket_hook(endpoint.url)

    def own(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(websocket, original_func, action, session_id, **argument).result(30)

    session.open(metadata_hook=own)
    session.update_metadata({"connection_id": "c-1", "n": 1})
    assert session.get_metadata() == {"metadata": {"connection_id": "c-1", "n": 1}}
    eventually(lambda: endpoint.requests)
    assert told(endpoint) == [("c-1", "update", {"n": 1})]


@pytest.mark.own_factory
@pytest.mark.parametrize("form", alternating("def", "async def", "def that returns a coroutine", "chain in a def"))
def test_an_operation_that_fails_is_told_to_the_caller_alone(
    session: Session, factory: MongoDBSessionManagerFactory, moto: str, form: str
) -> None:
    hook = create_metadata_sqs_hook("https://sqs.eu-west-1.amazonaws.com/1/q", endpoint_url=moto)
    session.open().update_metadata({"a": "text"})
    session.open(metadata_hook=FORMS[form](hook))
    with pytest.raises(ValueError, match="leads"):
        session.update_metadata({"a.b": 1})
    assert factory.get_notification_stats()["submitted"] == 0


MEMBERS: dict[str, Callable[[Hook], Hook]] = {
    "aws": lambda aws: aws,
    "def": lambda aws: plain,
    "async": lambda aws: plain_async,
    "coroutine": lambda aws: lambda *args, **kwargs: plain_async(*args, **kwargs),
    "chain": lambda aws: chain_hooks(plain_async, plain),
}
CONTEXTS: dict[str, Callable[[Hook], Hook]] = {
    "itself": lambda chain: chain,
    "in a def": called,
    "in an async def": awaited,
    "in a chain": lambda chain: chain_hooks(chain),
}


@pytest.mark.parametrize("context", alternating(*CONTEXTS))
def test_chains_of_every_mixture(
    some: Callable[[list[Any], int], list[Any]], session: Session, endpoint: Endpoint, context: str
) -> None:
    endpoint.answers(200)
    websocket = create_metadata_websocket_hook(endpoint.url)
    mixtures = some([each for each in itertools.product(MEMBERS, repeat=3) if each.count("aws") == 1], 6)
    for number, mixture in enumerate(mixtures):
        chain = chain_hooks(*(MEMBERS[name](websocket) for name in mixture))
        session.open(metadata_hook=CONTEXTS[context](chain))
        assert session.update_metadata({"connection_id": "c-1", "n": number}) is None, mixture
        assert session.get_metadata() == {"metadata": {"connection_id": "c-1", "n": number}}, mixture
        session.close()
    assert told(endpoint) == [("c-1", "update", {"n": number}) for number in range(len(mixtures))]
