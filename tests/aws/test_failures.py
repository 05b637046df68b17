"""AWS down, refusing, hanging, throttling: the caller does not notice, the data is right, and nothing is untold."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import aioboto3
import pytest

from arrivals import Queue, Topic
from endpoint import Endpoint
from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
    NotificationEvent,
    create_feedback_sns_hook,
    create_metadata_sqs_hook,
)
from mongodb_session_manager.hooks import _aws
from proxy import Proxy
from support import CommandLog, alternating, eventually


@pytest.fixture
def distant(server: str, database: str, commands: CommandLog) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory whose server is some milliseconds away."""
    with (
        Proxy(server) as proxy,
        MongoDBSessionManagerFactory(proxy.uri, database, event_listeners=[commands]) as factory,
    ):
        proxy.delay = 0.005
        factory.create_session_manager("warm-up").close()
        commands.wait_for("createIndexes")
        commands.clear()
        yield factory
        factory.close(notification_timeout=0)


def refusing_url() -> str:
    """Return a URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def outage(kind: str, endpoint: Endpoint) -> str:
    """Return the URL of an AWS in trouble."""
    if kind == "down":
        return refusing_url()
    if kind == "hanging":
        endpoint.hangs()
    elif kind == "refusing":
        endpoint.answers((403, "AccessDenied", "not for you"))
    elif kind == "failing":
        endpoint.answers(500)
    return endpoint.url


KINDS = pytest.mark.parametrize("kind", alternating("down", "hanging", "refusing", "failing"))


@KINDS
def test_a_sync_caller_does_not_notice(
    distant: MongoDBSessionManagerFactory, commands: CommandLog, endpoint: Endpoint, queue: Queue, kind: str
) -> None:
    url = outage(kind, endpoint)
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=url)
    feedback_hook = create_feedback_sns_hook(*["arn:aws:sns:eu-west-1:1:t"] * 3, endpoint_url=url)
    order: list[str] = []
    sent: dict[str, list[str]] = {}
    for name, hooks in (("plain", {}), ("hooked", {"metadata_hook": hook, "feedback_hook": feedback_hook})):
        manager = distant.create_session_manager(name, **hooks)
        commands.clear()
        for number in range(3):
            assert manager.update_metadata({"n": number}) is None
            assert manager.add_feedback({"rating": "up", "comment": str(number)}) is None
            order.append(name)
        sent[name] = list(commands.names)
        assert manager.get_metadata() == {"metadata": {"n": 2}}
        assert [feedback["comment"] for feedback in manager.get_feedbacks()] == list("012")
    # The callers are through, each with the same commands, and AWS has taken nothing yet.
    assert order == ["plain"] * 3 + ["hooked"] * 3
    assert sent["hooked"] == sent["plain"] == ["update"] * 6
    stats = distant.get_notification_stats()
    assert stats["submitted"] == 6
    assert stats["delivered"] == 0


@KINDS
@pytest.mark.anyio
async def test_an_async_caller_does_not_notice(
    distant: MongoDBSessionManagerFactory, commands: CommandLog, endpoint: Endpoint, queue: Queue, kind: str
) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=outage(kind, endpoint))
    manager = await distant.create_session_manager_async("s", metadata_hook=hook)
    commands.clear()
    for number in range(3):
        assert await manager.update_metadata({"n": number}) is None
    assert commands.names == ["update"] * 3
    assert distant.get_notification_stats()["delivered"] == 0
    if kind in ("down", "failing"):
        await asyncio.to_thread(eventually, lambda: distant.get_notification_stats()["retried"])
    assert await manager.get_metadata() == {"metadata": {"n": 2}}


def test_what_hangs_arrives_once_it_hangs_no_more(
    factory: MongoDBSessionManagerFactory, endpoint: Endpoint, queue: Queue
) -> None:
    endpoint.hangs()
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        for number in range(5):
            manager.update_metadata({"n": number})
        eventually(lambda: endpoint.requests)
        assert endpoint.answered == 0
        endpoint.release()
    assert [message.metadata["n"] for message in queue.arrived()] == list(range(5))


TROUBLES = [(400, "ThrottlingException", ""), (403, "RequestThrottled", "")]


@pytest.mark.own_factory
@pytest.mark.parametrize("trouble", alternating(500, 503, 429, *((each,) for each in TROUBLES)), ids=str)
def test_three_failures_and_then_it_arrives(
    factory: MongoDBSessionManagerFactory, endpoint: Endpoint, queue: Queue, trouble: Any
) -> None:
    endpoint.answers(trouble, trouble, trouble, "pass")
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"n": 1})
        manager.update_metadata({"n": 2})
    assert [message.metadata["n"] for message in queue.arrived()] == [1, 2]
    stats = factory.get_notification_stats()
    assert (stats["retried"], stats["delivered"], stats["failed"]) == (3, 2, 0)


def test_feedback_too(factory: MongoDBSessionManagerFactory, endpoint: Endpoint, topic: Topic) -> None:
    endpoint.answers(500, 500, 500, "pass")
    hook = create_feedback_sns_hook(topic.arn, "none", "none", endpoint_url=endpoint.url)
    with factory.create_session_manager("s", feedback_hook=hook) as manager:
        manager.add_feedback({"rating": "up", "comment": "Great"})
    assert [told["Message"] for told in topic.arrived()] == ["Session: s\n\nGreat"]


def test_a_retry_to_a_fifo_queue_is_the_same_event(
    factory: MongoDBSessionManagerFactory, endpoint: Endpoint, fifo_queue: Queue
) -> None:
    """An answer that was lost: the message is there already, and its second try is recognised."""
    endpoint.answers(500, "pass")
    hook = create_metadata_sqs_hook(fifo_queue.url, endpoint_url=endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"n": 1})
    first, second = (body for _, body in endpoint.requests)
    assert first == second
    assert b"MessageDeduplicationId" in first


@pytest.mark.parametrize(
    "refusal",
    [
        (403, "AccessDenied", "User: arn:aws:iam::1:user/ada; token=SECRETTOKEN"),
        (400, "AWS.SimpleQueueService.NonExistentQueue", "SECRETTOKEN"),
        (400, "InvalidParameterValue", "SECRETTOKEN"),
        (403, "SignatureDoesNotMatch", "x-amz-security-token:SECRETTOKEN"),
    ],
)
def test_what_is_refused_is_tried_once_and_told(
    factory: MongoDBSessionManagerFactory,
    endpoint: Endpoint,
    queue: Queue,
    caplog: pytest.LogCaptureFixture,
    credentials: dict[str, str],
    refusal: Any,
) -> None:
    caplog.set_level(logging.DEBUG, "mongodb_session_manager")
    told: list[tuple[NotificationEvent, BaseException]] = []
    endpoint.answers(refusal)
    hook = create_metadata_sqs_hook(
        queue.url, endpoint_url=endpoint.url, on_error=lambda event, error: told.append((event, error))
    )
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"password": "content"})
    [(event, error)] = told
    assert (event.name, event.tries, len(endpoint.requests)) == ("sqs.metadata_update", 1, 1)
    assert event.message is not None
    assert type(error).__module__.startswith("botocore")
    ours = [record for record in caplog.records if record.name.startswith("mongodb_session_manager")]
    [logged] = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert "sqs.metadata_update" in logged
    for secret in ("SECRETTOKEN", "content", credentials["AWS_SECRET_ACCESS_KEY"], credentials["AWS_ACCESS_KEY_ID"]):
        assert secret not in " ".join(record.getMessage() for record in ours)


def test_no_credentials_is_final(
    factory: MongoDBSessionManagerFactory, endpoint: Endpoint, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    told: list[str] = []
    hook = create_metadata_sqs_hook(
        queue.url,
        endpoint_url=endpoint.url,
        aws_session=aioboto3.Session(),
        on_error=lambda event, error: told.append(type(error).__name__),
    )
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"n": 1})
        assert manager.get_metadata() == {"metadata": {"n": 1}}
    assert told == ["NoCredentialsError"]


def test_connections_that_break_off_are_worth_another_try() -> None:
    for error in (
        _aws.aws.EndpointConnectionError(endpoint_url="x"),
        _aws.aws.ConnectionClosedError(endpoint_url="x"),
        _aws.aws.ReadTimeoutError(endpoint_url="x"),
        TimeoutError(),
        ConnectionResetError(),
    ):
        assert _aws.is_worth_retrying(error)
    for error in (_aws.aws.ParamValidationError(report="x"), _aws.aws.NoRegionError(), TypeError()):
        assert not _aws.is_worth_retrying(error)


def test_requests_are_sent_from_the_librarys_own_loop(
    factory: MongoDBSessionManagerFactory, endpoint: Endpoint, queue: Queue
) -> None:
    """No call in a thread: what sends is the event loop's thread, the caller's never."""
    session = aioboto3.Session()
    threads: list[str] = []
    session.events.register("before-send.sqs.SendMessage", lambda **_: threads.append(threading.current_thread().name))
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url, aws_session=session)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        for number in range(3):
            manager.update_metadata({"n": number})
    assert threads == ["mongodb-session-manager-io"] * 3
