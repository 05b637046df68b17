"""What is promised of anything delivered in the background, AWS or not."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import tracemalloc
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from mongodb_session_manager import (
    ConfigurationError,
    MongoDBSessionManagerFactory,
    NotificationError,
    NotificationEvent,
    notify_later,
)
from mongodb_session_manager._io.loop import io_portal
from mongodb_session_manager._notifications.dispatcher import Dispatcher
from mongodb_session_manager._notifications.notification import Notification, Policy, Source
from support import eventually


class Gate:
    """A delivery that waits until it is opened, and notes what was delivered where."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.delivered: list[Any] = []
        self.threads: set[str] = set()

    def delivering(self, what: Any) -> Any:
        async def deliver() -> None:
            while not self.opened.is_set():  # noqa: ASYNC110 - opened by other threads
                await asyncio.sleep(0.01)
            self.threads.add(threading.current_thread().name)
            self.delivered.append(what)

        return deliver


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def small() -> Iterator[Dispatcher]:
    """A dispatcher with room for 100 notifications and 10,000 bytes."""
    dispatcher = Dispatcher(io_portal(), max_waiting=100, max_bytes=10_000)
    yield dispatcher
    dispatcher.portal.call(dispatcher.aclose, 0)


def notification(deliver: Any, source: Source, session_id: str = "s", **options: Any) -> Notification:
    policy = options.pop("policy", Policy())
    values = {"on_error": None, "message": None, **options}
    return Notification(name="test", session_id=session_id, deliver=deliver, source=source, policy=policy, **values)


def test_submitting_waits_for_nothing_and_order_is_kept_per_session(gate: Gate) -> None:
    for number in range(20):
        for session in "abc":
            notify_later("test", session, gate.delivering((session, number)))
    assert gate.delivered == []
    gate.opened.set()
    eventually(lambda: len(gate.delivered) == 60)
    for session in "abc":
        assert [number for name, number in gate.delivered if name == session] == list(range(20))
    assert gate.threads == {"mongodb-session-manager-io"}


def test_a_session_that_is_stuck_holds_up_no_other(gate: Gate) -> None:
    notify_later("test", "stuck", gate.delivering("stuck"))
    free = Gate()
    free.opened.set()
    for number in range(50):
        notify_later("test", f"free {number}", free.delivering(number))
    eventually(lambda: len(free.delivered) == 50)
    assert gate.delivered == []


def test_a_receiver_that_hangs_holds_up_no_other(gate: Gate) -> None:
    for number in range(50):
        notify_later("hanging", f"s {number}", gate.delivering(number))
    free = Gate()
    free.opened.set()
    for number in range(50, 100):
        notify_later("free", f"s {number}", free.delivering(number))
    eventually(lambda: len(free.delivered) == 50)
    assert gate.delivered == []
    gate.opened.set()
    eventually(lambda: sorted(gate.delivered) == list(range(50)))


async def _submit_from_a_loop(gate: Gate, number: int) -> None:
    notify_later("test", "s", gate.delivering(number))


def test_from_any_thread_and_loop(gate: Gate) -> None:
    threads = [threading.Thread(target=notify_later, args=("t", "s", gate.delivering(number))) for number in range(5)]
    for thread in threads:
        thread.start()
    asyncio.run(_submit_from_a_loop(gate, 5))
    io_portal().call(_submit_from_a_loop, gate, 6)
    for thread in threads:
        thread.join()
    gate.opened.set()
    eventually(lambda: sorted(gate.delivered) == list(range(7)))


class Failing:
    """A delivery that fails a number of times."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.tries = 0

    async def __call__(self) -> None:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)


def test_a_failed_delivery_is_tried_again_in_its_turn(gate: Gate) -> None:
    failing = Failing(ConnectionError(), TimeoutError(), asyncio.CancelledError())
    gate.opened.set()
    notify_later("test", "s", failing)
    notify_later("test", "s", gate.delivering("second"))
    eventually(lambda: gate.delivered == ["second"])
    assert failing.tries == 3  # a cancellation nobody asked for is final


def test_what_is_given_up_is_logged_once_by_name_and_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[NotificationEvent, BaseException]] = []
    error = ValueError("secret content")
    failing = Failing(error)
    notify_later(
        "my.event",
        "s",
        failing,
        on_error=lambda event, exception: told.append((event, exception)),
        retry_on=(OSError,),
        message="body",
    )
    eventually(lambda: told)
    [(event, exception)] = told
    assert (event.name, event.session_id, event.tries, event.message) == ("my.event", "s", 1, "body")
    assert exception is error
    assert failing.tries == 1
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "my.event" in record.getMessage()
    assert "ValueError" in record.getMessage()
    assert "secret" not in caplog.text
    assert "body" not in repr(event)


@pytest.mark.parametrize("types", [OSError, (OSError, KeyError), OSError | KeyError], ids=["one", "several", "a union"])
def test_a_delivery_is_tried_again_after_the_named_exceptions_only(types: Any) -> None:
    told: list[BaseException] = []
    failing, other = Failing(OSError(), OSError()), Failing(ValueError(), ValueError())
    for each in (failing, other):
        notify_later("test", "s", each, on_error=lambda _, error: told.append(error), retry_on=types, max_tries=2)
    eventually(lambda: len(told) == 2)
    assert (failing.tries, other.tries) == (2, 1)


def test_whatever_a_delivery_or_on_error_raises_ends_nothing(gate: Gate) -> None:
    def refuse(event: NotificationEvent, error: BaseException) -> None:
        raise RuntimeError("on_error itself")

    for error in (KeyboardInterrupt(), SystemExit(), asyncio.CancelledError(), ValueError()):
        for _ in range(4):
            notify_later("test", "s", Failing(error), on_error=refuse, max_tries=1)
    gate.opened.set()
    notify_later("test", "s", gate.delivering("last"))
    eventually(lambda: gate.delivered == ["last"])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_on_error_and_retry_on_may_raise_anything(gate: Gate, error: BaseException) -> None:
    def refuse(*_: object) -> bool:
        raise error

    for _ in range(20):
        notify_later("test", "s", Failing(OSError()), on_error=refuse, retry_on=refuse)
    gate.opened.set()
    notify_later("test", "s", gate.delivering("last"))
    eventually(lambda: gate.delivered == ["last"])


def test_a_retry_on_that_fails_ends_nothing(gate: Gate) -> None:
    def refuse(error: Exception) -> bool:
        raise RuntimeError("retry_on itself")

    for _ in range(20):
        notify_later("test", "s", Failing(OSError()), retry_on=refuse)
    gate.opened.set()
    notify_later("test", "s", gate.delivering("last"))
    eventually(lambda: gate.delivered == ["last"])


def test_a_try_takes_no_longer_than_its_limit(gate: Gate) -> None:
    told: list[BaseException] = []
    notify_later(
        "test", "s", gate.delivering(1), time_limit=0.05, max_tries=2, on_error=lambda _, error: told.append(error)
    )
    eventually(lambda: told)
    assert isinstance(told[0], TimeoutError)


def test_tries_are_bounded() -> None:
    told: list[int] = []
    failing = Failing(*[OSError()] * 9)
    notify_later("test", "s", failing, max_tries=3, on_error=lambda event, _: told.append(event.tries))
    eventually(lambda: told == [3])
    assert failing.tries == 3


@pytest.mark.parametrize("arguments", [("e", "s", None), ("e", "s", "not a function")])
def test_what_cannot_be_delivered_is_refused(arguments: Any) -> None:
    with pytest.raises(ConfigurationError):
        notify_later(*arguments)


def test_deliveries_run_in_nobodys_context() -> None:
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    async def deliver() -> None:
        seen.append(request.get())

    token = request.set("of somebody")
    notify_later("test", "s", deliver)
    request.reset(token)
    eventually(lambda: seen == ["none"])


def test_what_finds_no_room_fails_visibly_and_the_rest_arrives(
    small: Dispatcher, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    source, refused = Source(), []
    for number in range(200):
        small.submit(notification(gate.delivering(number), source, on_error=lambda event, error: refused.append(error)))
    assert (source.submitted, source.failed, source.waiting) == (200, 100, 100)
    assert len(refused) == 100
    assert {type(error) for error in refused} == {NotificationError}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(",")[0] for text in warnings] == [f"waiting=<{n}>" for n in (10, 20, 40, 80)]
    assert all("oldest_wait" in text for text in warnings)
    assert sum("event=<'test'>" in record.getMessage() for record in caplog.records) == 100
    gate.opened.set()
    eventually(lambda: source.delivered == 100)
    assert gate.delivered == list(range(100))
    assert (source.waiting, source.delivered + source.failed) == (0, source.submitted)


def test_large_messages_are_bounded_by_their_bytes(small: Dispatcher, gate: Gate) -> None:
    source = Source()
    tracemalloc.start()
    try:
        for number in range(500):
            small.submit(notification(gate.delivering(number), source, message=str(number).zfill(3000)))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (source.waiting, source.failed) == (3, 497)
    assert held < 1_000_000
    gate.opened.set()
    eventually(lambda: source.delivered == 3)
    small.submit(notification(gate.delivering("next"), source, message="x" * 9000))
    eventually(lambda: gate.delivered[-1] == "next")


def test_many_that_wait_take_little_memory(gate: Gate) -> None:
    dispatcher, source = Dispatcher(io_portal(), max_waiting=500), Source()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(1000):
            text = str(number).zfill(500)
            dispatcher.submit(notification(gate.delivering(text), source, f"s {number % 125}", message=text))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (source.waiting, source.failed) == (500, 500)
    assert held < 2_500_000
    gate.opened.set()
    dispatcher.portal.call(dispatcher.aclose, 60)
    assert (source.delivered, source.waiting) == (500, 0)


def test_the_warning_comes_back_with_the_next_backlog(small: Dispatcher, caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    for _ in range(2):
        gate = Gate()
        for number in range(15):
            small.submit(notification(gate.delivering(number), source))
        gate.opened.set()
        eventually(lambda: source.waiting == 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_closed_dispatcher_gives_up_the_rest_by_name(
    small: Dispatcher, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    source, told = Source(), []
    for number in range(3):
        small.submit(notification(gate.delivering(number), source, on_error=lambda event, _: told.append(event.name)))
    small.portal.call(small.aclose, 0.1)
    small.submit(notification(gate.delivering(4), source, on_error=lambda event, _: told.append(event.name)))
    assert told == ["test"] * 4
    assert (source.failed, source.waiting, source.submitted) == (4, 0, 4)
    assert "undelivered=<'test x 3'>" in caplog.text


def test_a_drain_waits_for_no_pause(small: Dispatcher) -> None:
    source = Source()
    failing = Failing(*[OSError()] * 4)
    small.submit(notification(failing, source))
    eventually(lambda: failing.tries == 4)
    assert small._pausing
    small.portal.call(small.drain, 20.0)
    assert (failing.tries, source.delivered) == (5, 1)


def hook(gate: Gate, name: str) -> Any:
    async def notifying(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        result = await original_func(**argument)
        notify_later(name, session_id, gate.delivering((session_id, argument)))
        return result

    return notifying


@pytest.mark.own_factory
def test_a_users_own_hook_is_counted_for_its_factory(factory: MongoDBSessionManagerFactory, gate: Gate) -> None:
    notify_later("of nobody", "s", gate.delivering("nobody"))
    with factory.create_session_manager("s", metadata_hook=hook(gate, "mine")) as manager:
        manager.update_metadata({"a": 1})
        stats = factory.get_notification_stats()
        assert stats.pop("oldest_wait") >= 0
        assert stats == {"submitted": 1, "delivered": 0, "retried": 0, "failed": 0, "waiting": 1}
        gate.opened.set()
    assert gate.delivered == ["nobody", ("s", {"metadata": {"a": 1}})]
    assert factory.get_notification_stats() == {
        "submitted": 1,
        "delivered": 1,
        "retried": 0,
        "failed": 0,
        "waiting": 0,
        "oldest_wait": 0.0,
    }


def test_closing_a_manager_waits_for_its_session_only(factory: MongoDBSessionManagerFactory, gate: Gate) -> None:
    free = Gate()
    free.opened.set()
    stuck = factory.create_session_manager("stuck", metadata_hook=hook(gate, "stuck"))
    stuck.update_metadata({"a": 1})
    with factory.create_session_manager("free", metadata_hook=hook(free, "free")) as manager:
        for number in range(20):
            manager.update_metadata({"a": number})
    assert len(free.delivered) == 20
    assert gate.delivered == []
    gate.opened.set()
    stuck.close()
    assert len(gate.delivered) == 1


def test_closing_is_bounded_and_says_what_is_left(
    factory: MongoDBSessionManagerFactory, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    manager = factory.create_session_manager("s", metadata_hook=hook(gate, "mine"))
    manager.update_metadata({"a": 1})
    manager.update_metadata({"a": 2})
    manager.close(notification_timeout=0.05)
    manager.close()
    assert "session_id=<'s'>, undelivered=<'mine x 2'>" in caplog.text
    factory.close(notification_timeout=0.05)
    assert "session_id=<None>, undelivered=<'mine x 2'>" in caplog.text
    gate.opened.set()
    eventually(lambda: len(gate.delivered) == 2)


@pytest.mark.anyio
async def test_closing_a_factory_waits_for_all(factory: MongoDBSessionManagerFactory, gate: Gate) -> None:
    for session in "abc":
        manager = await factory.create_session_manager_async(session, feedback_hook=hook(gate, "mine"))
        await manager.add_feedback({"rating": "up"})
    asyncio.get_running_loop().call_later(0.05, gate.opened.set)
    await factory.close_async()
    assert sorted(session for session, _ in gate.delivered) == ["a", "b", "c"]
