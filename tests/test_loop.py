"""The I/O thread and the ways to reach it."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pytest

import interpreter
from mongodb_session_manager import EventLoopError
from mongodb_session_manager._io.loop import io_portal, portal_to
from mongodb_session_manager._io.portal import Portal
from support import eventually

NAME = "mongodb-session-manager-io"

WHO: ContextVar[str] = ContextVar("who", default="nobody")


@pytest.fixture
def portal() -> Portal:
    return io_portal()


async def until(condition: Callable[[], object]) -> None:
    """Wait on a running event loop until `condition()` is true."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@contextmanager
def serving_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own, as an application's would be; it ends like `asyncio.run` does."""
    started: list[asyncio.AbstractEventLoop] = []
    end = threading.Event()

    async def main() -> None:
        started.append(asyncio.get_running_loop())
        await until(end.is_set)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    eventually(lambda: started)
    try:
        yield started[0]
    finally:
        end.set()
        thread.join()


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(0)`, `work(1)`, ... on threads that start at the same moment; raise what the first of them raised."""
    together = threading.Barrier(count)
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        together.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


async def double(number: int, *, plus: int = 0) -> int:
    await asyncio.sleep(0)
    return number * 2 + plus


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


async def who() -> str:
    return WHO.get()


class Gate:
    """Work that says when it began, waits, and says that it ended."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.ended = threading.Event()

    async def work(self, error: Exception | None = None) -> str:
        self.begun.set()
        await until(self.open.is_set)
        self.ended.set()
        if error is not None:
            raise error
        return "done"


def test_call_returns_the_result(portal: Portal) -> None:
    assert portal.call(double, 20, plus=2) == 42


@pytest.mark.anyio
async def test_run_returns_the_result(portal: Portal) -> None:
    assert await portal.run(double, 20, plus=2) == 42


def test_submit_returns_a_future(portal: Portal) -> None:
    assert portal.submit(double, 20, plus=2).result(30) == 42


def test_call_and_submit_pass_exceptions_on(portal: Portal) -> None:
    error = LookupError("as it was")
    with pytest.raises(LookupError) as called:
        portal.call(fail, error)
    assert called.value is error
    assert portal.submit(fail, error).exception(30) is error


@pytest.mark.anyio
async def test_run_passes_exceptions_on(portal: Portal) -> None:
    error = LookupError("as it was")
    with pytest.raises(LookupError) as caught:
        await portal.run(fail, error)
    assert caught.value is error


@pytest.mark.anyio
async def test_run_does_not_hold_up_the_callers_loop(portal: Portal) -> None:
    gate = Gate()
    waiting = asyncio.create_task(portal.run(gate.work))
    await until(gate.begun.is_set)
    assert not waiting.done()
    gate.open.set()
    assert await waiting == "done"


def test_work_starts_in_the_order_of_submission(portal: Portal) -> None:
    seen: list[int] = []

    async def note(number: int) -> None:
        seen.append(number)

    last = [portal.submit(note, number) for number in range(500)][-1]
    last.result(30)
    assert seen == list(range(500))


def test_each_of_many_threads_keeps_its_order(portal: Portal) -> None:
    seen: dict[int, list[int]] = {thread: [] for thread in range(8)}

    async def note(thread: int, number: int) -> None:
        seen[thread].append(number)

    def work(thread: int) -> None:
        for future in [portal.submit(note, thread, number) for number in range(100)]:
            future.result(30)

    in_threads(8, work)
    assert seen == {thread: list(range(100)) for thread in range(8)}


@pytest.mark.anyio
async def test_context_variables_of_a_task_are_visible(portal: Portal) -> None:
    WHO.set("task")
    assert await portal.run(who) == "task"
    assert await asyncio.wrap_future(portal.submit(who)) == "task"


def test_context_variables_of_a_thread_are_visible(portal: Portal) -> None:
    def work(number: int) -> None:
        WHO.set(f"thread {number}")
        assert portal.call(who) == f"thread {number}"
        assert portal.submit(who).result(30) == f"thread {number}"

    in_threads(8, work)


def test_context_variables_set_by_the_work_stay_there(portal: Portal) -> None:
    async def become() -> None:
        WHO.set("somebody else")

    portal.call(become)
    assert WHO.get() == "nobody"
    assert portal.call(who) == "nobody"


def test_many_callers_from_many_threads_and_loops(portal: Portal) -> None:
    async def tasks(thread: int) -> list[int]:
        return await asyncio.gather(*(portal.run(double, thread * 1000 + number) for number in range(50)))

    def work(thread: int) -> None:
        if thread % 2:
            results = asyncio.run(tasks(thread))
        else:
            results = [portal.call(double, thread * 1000 + number) for number in range(50)]
        assert results == [(thread * 1000 + number) * 2 for number in range(50)]

    in_threads(16, work)


def test_all_work_runs_on_one_thread(portal: Portal) -> None:
    names: list[str] = []

    async def note() -> None:
        names.append(threading.current_thread().name)

    in_threads(8, lambda _: portal.call(note))
    assert names == [NAME] * 8


@pytest.mark.anyio
async def test_a_cancelled_caller_does_not_cancel_the_work(portal: Portal) -> None:
    gate = Gate()
    caller = asyncio.create_task(portal.run(gate.work))
    await until(gate.begun.is_set)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gate.open.set()
    await until(gate.ended.is_set)


@pytest.mark.anyio
async def test_a_cancelled_caller_on_the_same_loop_does_not_cancel_the_work() -> None:
    gate = Gate()
    caller = asyncio.create_task(portal_to(asyncio.get_running_loop()).run(gate.work))
    await until(gate.begun.is_set)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gate.open.set()
    await until(gate.ended.is_set)


@pytest.mark.anyio
async def test_a_caller_that_lost_patience_does_not_cancel_the_work(portal: Portal) -> None:
    gate = Gate()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(portal.run(gate.work), 0.05)
    gate.open.set()
    await until(gate.ended.is_set)


@pytest.mark.anyio
@pytest.mark.parametrize("is_far", [True, False])
async def test_work_that_fails_after_its_caller_left_is_quiet(
    portal: Portal, caplog: pytest.LogCaptureFixture, is_far: bool
) -> None:
    gate = Gate()
    if not is_far:
        portal = portal_to(asyncio.get_running_loop())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(portal.run(gate.work, LookupError("nobody listens")), 0.05)
    gate.open.set()
    await until(gate.ended.is_set)
    await portal.run(double, 1)  # what was handed over before this has arrived
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("error", [None, LookupError("nobody listens")])
def test_the_callers_loop_may_be_closed_before_the_work_ends(
    portal: Portal, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    gate = Gate()

    async def main() -> asyncio.Task[str]:
        task = asyncio.create_task(portal.run(gate.work, error))
        await until(gate.begun.is_set)
        return task

    asyncio.run(main())
    gate.open.set()
    eventually(gate.ended.is_set)
    assert portal.call(double, 1) == 2
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_call_from_the_io_loop_is_refused_with_a_sentence(portal: Portal) -> None:
    async def inner() -> None:
        portal.call(double, 1)

    with pytest.raises(EventLoopError, match=r"event loop it blocks: use .*async"):
        portal.call(inner)
    gc.collect()


def test_run_from_the_io_loop_works(portal: Portal) -> None:
    async def inner() -> int:
        return await portal.run(double, 21)

    assert portal.call(inner) == 42


@pytest.mark.may_block
def test_call_from_another_running_loop_blocks_until_done(portal: Portal) -> None:
    async def main() -> int:
        return portal.call(double, 21)

    assert asyncio.run(main()) == 42


def test_a_loop_that_never_ran_is_refused(portal: Portal) -> None:
    loop = asyncio.new_event_loop()
    try:
        check_refused(portal, Portal(loop))
    finally:
        loop.close()


def test_a_loop_that_ended_is_refused(portal: Portal) -> None:
    with serving_loop() as loop:
        dead = Portal(loop)
        assert dead.call(double, 21) == 42
    check_refused(portal, dead)


def check_refused(portal: Portal, dead: Portal) -> None:
    sentence = r"event loop .* does not run: .*connection_string"
    with pytest.raises(EventLoopError, match=sentence):
        dead.call(double, 1)
    with pytest.raises(EventLoopError, match=sentence):
        dead.submit(double, 1)
    with pytest.raises(EventLoopError, match=sentence):
        asyncio.run(dead.run(double, 1))
    gc.collect()  # a coroutine that was made and never awaited would warn here


def test_a_loop_that_ends_under_a_waiting_thread_raises_there() -> None:
    gate = Gate()
    outcome: list[BaseException] = []

    def wait(portal: Portal) -> None:
        try:
            portal.call(gate.work)
        except BaseException as error:
            outcome.append(error)

    with serving_loop() as loop:
        waiting = threading.Thread(target=wait, args=(Portal(loop),))
        waiting.start()
        eventually(gate.begun.is_set)
    waiting.join(30)
    assert [type(error) for error in outcome] == [EventLoopError]


def test_a_loop_that_ends_under_a_waiting_task_raises_there() -> None:
    gate = Gate()
    outcome: list[BaseException] = []

    async def wait(portal: Portal) -> None:
        try:
            await portal.run(gate.work)
        except BaseException as error:
            outcome.append(error)

    with serving_loop() as loop:
        waiting = threading.Thread(target=lambda: asyncio.run(wait(Portal(loop))))
        waiting.start()
        eventually(gate.begun.is_set)
    waiting.join(30)
    assert [type(error) for error in outcome] == [EventLoopError]


def test_drain_waits_for_what_is_under_way() -> None:
    gate = Gate()
    with serving_loop() as loop:
        portal = Portal(loop)
        future = portal.submit(gate.work)
        assert portal.drain(0.05) == 1
        gate.open.set()
        assert portal.drain(30) == 0
        assert future.result(0) == "done"


def test_drain_waits_for_what_the_loop_itself_has_handed_in() -> None:
    gate = Gate()
    with serving_loop() as loop:
        portal = Portal(loop)

        async def leave_behind() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(portal.run(gate.work), 0.05)

        portal.call(leave_behind)
        assert portal.drain(0.05) == 1
        gate.open.set()
        assert portal.drain(30) == 0
        assert gate.ended.is_set()


def test_drain_hears_of_no_failure() -> None:
    with serving_loop() as loop:
        portal = Portal(loop)
        future = portal.submit(fail, LookupError("its caller hears of it"))
        assert portal.drain(30) == 0
        assert isinstance(future.exception(0), LookupError)


class Stop(BaseException):
    """Of no kind that the event loop knows."""


FATAL = pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), Stop()], ids=repr
)


@FATAL
def test_whatever_the_work_raises_reaches_a_waiting_thread_and_not_the_loop(
    portal: Portal, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised:
        portal.call(fail, error)
    assert raised.value is error
    assert portal.call(double, 21) == 42
    assert io_portal() is portal


@FATAL
def test_whatever_the_work_raises_reaches_a_waiting_task_and_not_the_loop(portal: Portal, error: BaseException) -> None:
    with pytest.raises(type(error)):
        asyncio.run(portal.run(fail, error))
    assert portal.call(double, 21) == 42


@FATAL
def test_whatever_the_work_raises_leaves_the_loop_of_a_borrowed_client_alone(error: BaseException) -> None:
    with serving_loop() as loop:
        portal = Portal(loop)
        with pytest.raises(type(error)):
            portal.call(fail, error)
        assert portal.call(double, 21) == 42


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_tasks_and_callbacks_that_end_an_event_loop_do_not_end_the_io_loop(
    portal: Portal, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def callback() -> None:
        raise error

    async def start() -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        loop.call_soon(callback)
        loop.call_later(0.01, loop.stop)
        return loop.create_task(fail(error))

    task = portal.call(start)
    eventually(task.done)
    assert portal.call(double, 21) == 42
    time.sleep(0.05)
    assert portal.call(double, 21) == 42
    assert task.exception() is error
    assert {record.getMessage().partition(",")[0] for record in caplog.records} == {
        f"error=<{type(error).__name__}> | raised on the I/O loop"
    }


# Blocked loops.


@pytest.mark.may_block
def test_a_call_to_a_blocked_loop_is_an_error_and_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mongodb_session_manager._io.portal.START_TIMEOUT", 0.3)
    made: list[str] = []

    async def note(text: str) -> None:
        made.append(text)

    async def block(portal: Portal, done: threading.Event) -> None:
        done.wait(30)

    with serving_loop() as loop:
        portal, done = Portal(loop), threading.Event()
        blocking = portal.submit(block, portal, done)
        eventually(blocking.running)
        helpful = pytest.raises(EventLoopError, match=r"blocks it.*invoke_async")
        with helpful:
            portal.call(note, "thread")
        with helpful:
            asyncio.run(portal.run(note, "task"))
        done.set()
        portal.call(note, "afterwards")
    assert made == ["afterwards"]


def test_work_may_take_longer_than_its_beginning(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mongodb_session_manager._io.portal.START_TIMEOUT", 0.1)
    monkeypatch.setattr("mongodb_session_manager._io.portal._BLOCKED_START_TIMEOUT", 0.1)

    async def work() -> str:
        await asyncio.sleep(0.5)
        return "done"

    assert portal.call(work) == "done"
    assert asyncio.run(portal.run(work)) == "done"


def test_the_io_thread_is_a_named_daemon(portal: Portal) -> None:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == NAME)
    assert thread.daemon


def test_portal_to_the_io_loop_is_the_io_portal(portal: Portal) -> None:
    assert io_portal() is portal
    assert portal_to(portal.loop) is portal
    with serving_loop() as loop:
        assert portal_to(loop).call(double, 21) == 42


FIRST_USE = """
import sys, threading
for name in [name for name in sys.modules if name.startswith("mongodb_session_manager")]:
    del sys.modules[name]  # this process is a fork of one that has imported them
assert threading.active_count() == 1, threading.enumerate()
from mongodb_session_manager._io import loop
sys.setswitchinterval(1e-6)
assert threading.active_count() == 1, threading.enumerate()
together, portals = threading.Barrier(50), []
def ask():
    together.wait()
    portals.append(loop.io_portal())
for _ in range(5):  # the threads do not always meet
    loop._thread = None
    portals.clear()
    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(len(portals), len(set(map(id, portals))))
print(*(t.name for t in threading.enumerate() if t.daemon))
"""

FIRST_USE_AT_EXIT = """
import atexit, threading
from mongodb_session_manager import EventLoopError
from mongodb_session_manager._io.loop import io_portal
def late():
    try:
        io_portal()
    except EventLoopError as error:
        print(error)
atexit.register(late)
"""


POLICY_SET_LATER = """
import asyncio
from mongodb_session_manager._io.loop import io_portal
async def nothing(): pass
io_portal().call(nothing)
class Policy(asyncio.DefaultEventLoopPolicy):
    def get_event_loop(self):
        raise RuntimeError("not here")
asyncio.set_event_loop_policy(Policy())
io_portal().call(nothing)
"""

UNDER_GEVENT = """
import sys, types
sys.modules["gevent.monkey"] = types.ModuleType("gevent.monkey")
sys.modules["gevent.monkey"].is_module_patched = lambda name: name == "threading"
from mongodb_session_manager import EventLoopError, MongoDBSessionManager
try:
    MongoDBSessionManager("s", "mongodb://127.0.0.1:1")
except EventLoopError as error:
    print(error)
"""


def run_script(script: str) -> str:
    shown, errors = interpreter.run(script)
    assert errors == ""
    return shown


def test_importing_starts_no_thread_and_first_users_at_once_start_one() -> None:
    assert run_script(FIRST_USE) == "50 1\n" * 5 + " ".join([NAME] * 5) + "\n"


def test_first_use_while_the_interpreter_ends_is_refused_with_a_sentence() -> None:
    assert "the interpreter is shutting down" in run_script(FIRST_USE_AT_EXIT)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="event-loop policies are deprecated")
def test_an_event_loop_policy_set_later_does_not_matter() -> None:
    assert run_script(POLICY_SET_LATER) == ""


def test_greenlets_in_the_place_of_threads_are_refused_with_a_sentence() -> None:
    assert "gevent has patched the module 'threading'" in run_script(UNDER_GEVENT)
