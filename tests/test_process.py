"""What happens when a process ends, forks, or closes while it is busy."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pymongo
import pytest

import interpreter
from interpreter import FORK_WARNING
from mongodb_session_manager import MongoDBSessionError, MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import agent, eventually, fail_point, sampled, texts

Documents = pymongo.collection.Collection[dict[str, Any]]
Some = Callable[[Iterable[Any], int], list[Any]]

PRELUDE = """
import asyncio, atexit, os, sys, threading, time
from motor.motor_asyncio import AsyncIOMotorClient
from mongodb_session_manager import *
from support import agent

uri, database = sys.argv[1:]

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def redaction(text):
    return {"role": "assistant", "content": [{"text": text}]}
"""

# PyMongo's own warning to the owner of a client who did not close it.
UNCLOSED = {"borrowed Motor": ("ignore::ResourceWarning",)}

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@dataclass(frozen=True)
class Ended:
    output: list[str]
    stderr: str


def run(script: str, uri: str, database: str, *warnings: str, timeout: float = 60) -> Ended:
    """Run a script with warnings as errors, except for the given ones, to its end, which must be a normal one."""
    output, stderr = interpreter.run(PRELUDE + script, uri, database, warnings=warnings, timeout=timeout)
    return Ended(output.splitlines(), stderr)


def run_silently(script: str, uri: str, database: str, *warnings: str) -> list[str]:
    """Run a script that may not write to its standard error; return the lines of its output."""
    ended = run(script, uri, database, *warnings)
    assert ended.stderr == ""
    return ended.output


def conversation(stored: Documents, session_id: str, agent_key: str = "agent") -> list[str]:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    return texts(document["agents"][agent_key]["messages"])


# Exiting without closing.

MANAGERS = {
    "owned": "manager = MongoDBSessionManager('s', uri, database)",
    "one call": "manager = create_mongodb_session_manager('s', uri, database)",
    "factory": """
factory = MongoDBSessionManagerFactory(uri, database)
manager = factory.create_session_manager('s')
""",
    "temporary factory": "manager = MongoDBSessionManagerFactory(uri, database).create_session_manager('s')",
    "global factory": """
initialize_global_factory(uri, database)
manager = get_global_factory().create_session_manager('s')
""",
    "borrowed Motor": """
client = AsyncIOMotorClient(uri)
manager = MongoDBSessionManager('s', client=client, database_name=database)
""",
    "pool": """
manager = MongoDBSessionManager('s', client=MongoDBConnectionPool.initialize(uri), database_name=database)
""",
}

ASYNC_MANAGERS = {
    "owned": "manager = await create_mongodb_session_manager_async('s', uri, database)",
    "opened": "manager = await AsyncMongoDBSessionManager('s', uri, database).open()",
    "factory": """
    factory = MongoDBSessionManagerFactory(uri, database)
    manager = await factory.create_session_manager_async('s')
""",
    "global factory": """
    initialize_global_factory(uri, database)
    manager = await get_global_factory().create_session_manager_async('s')
""",
    "borrowed Motor": """
    client = AsyncIOMotorClient(uri)
    manager = await create_mongodb_session_manager_async('s', client=client, database_name=database)
""",
    "synchronous owned": "manager = await asyncio.to_thread(MongoDBSessionManager, 's', uri, database)",
}


def check_exit(script: str, server: str, database: str, stored: Documents, kind: str) -> None:
    assert run_silently(script, server, database, *UNCLOSED.get(kind, ())) == []
    assert conversation(stored, "s") == ["hi", "hello", "I am off", "bye"]
    stored.delete_many({})


def test_exit_after_sync_turns(server: str, database: str, stored: Documents, some: Some) -> None:
    ways = [*((kind, "") for kind in MANAGERS), ("factory", "sys.exit()"), ("owned", "del manager")]
    for kind, end in some(ways, 3):
        script = f"""
{MANAGERS[kind]}
first = agent(manager, "hello", "bye")
first("hi")
first("I am off")
{end}
"""
        check_exit(script, server, database, stored, kind)


def test_exit_after_async_turns(server: str, database: str, stored: Documents, some: Some) -> None:
    ways = [*((kind, "") for kind in ASYNC_MANAGERS), ("owned", "sys.exit(0)"), ("factory", "sys.exit(0)")]
    for kind, end in some(ways, 3):
        script = f"""
async def main():
    {ASYNC_MANAGERS[kind]}
    first = agent(manager, "hello", "bye")
    await first.invoke_async("hi")
    await first.invoke_async("I am off")
    {end}

asyncio.run(main())
"""
        check_exit(script, server, database, stored, kind)


def test_an_interpreter_that_was_not_forked_imports_nothing_on_an_event_loop_and_exits(
    server: str, database: str, stored: Documents
) -> None:
    program = """
import asyncio, sys

refused = True

def refuse(event, arguments):
    if event == "import" and refused and asyncio._get_running_loop() is not None:
        raise RuntimeError(f"{arguments[0]} is imported on an event loop")

sys.addaudithook(refuse)
from blockbuster import blockbuster_ctx
from pymongo import MongoClient
from mongodb_session_manager import *

def hook(original, action, session_id, /, **argument):
    return original(**argument)

async def use(lent):
    async with MongoDBSessionManagerFactory(uri, database) as factory:
        async with await factory.create_session_manager_async("first", metadata_hook=hook) as manager:
            await manager.update_metadata({"a": 1})
        lines = [line async for line in factory.export_session_async("first")]
        await factory.import_session_async(lines, "second")
        await factory.fork_session_async("first", "third")
    async with AsyncMongoDBSessionRepository(client=lent, database_name=database) as repository:
        print(await repository.count_sessions())

uri, database = sys.argv[1:]
with MongoClient(uri) as lent, blockbuster_ctx():
    asyncio.run(use(lent))
refused = False

from support import agent
agent(MongoDBSessionManager("s", uri, database), "hello")("hi")

async def work():
    manager = await create_mongodb_session_manager_async("t", uri, database)
    await agent(manager, "hello").invoke_async("hi")

asyncio.run(work())
"""
    command = interpreter.python("-c", program, server, database)
    ended = subprocess.run(command, env=interpreter.environment(), capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3\n", "")
    for session in ("s", "t"):
        assert conversation(stored, session) == ["hi", "hello"]


def test_exit_between_several_event_loops(server: str, database: str, stored: Documents) -> None:
    script = """
factory = MongoDBSessionManagerFactory(uri, database)
async def turn(text):
    manager = await factory.create_session_manager_async("s")
    await agent(manager, "yes").invoke_async(text)
for number in range(3):
    asyncio.run(turn(f"turn {number}"))
agent(factory.create_session_manager("s"), "yes")("turn 3")
"""
    assert run_silently(script, server, database) == []
    assert conversation(stored, "s") == [text for n in range(4) for text in (f"turn {n}", "yes")]


@pytest.mark.parametrize(
    ("kind", "end"),
    sampled(
        [("owned", ""), ("factory", ""), ("global factory", "sys.exit(0)"), ("pool", "")],
        *(("owned", ""), ("global factory", "sys.exit(0)")),
    ),
)
def test_exit_right_after_work_was_only_submitted(
    server: str, database: str, stored: Documents, kind: str, end: str
) -> None:
    script = f"""
{MANAGERS[kind]}
first = agent(manager, "a private thing")
first("hi")

async def main():
    manager.redact_latest_message(redaction("removed"), first)
    {end}

asyncio.run(main())
"""
    assert run_silently(script, server, database) == []
    document = stored.find_one({"_id": "s"})
    assert "a private thing" not in str(document)
    assert "removed" in str(document)


def test_exit_right_after_work_of_an_async_manager_was_only_submitted(
    server: str, database: str, stored: Documents
) -> None:
    script = """
async def main():
    manager = await create_mongodb_session_manager_async("s", uri, database)
    first = agent(manager, "a private thing")
    await first.invoke_async("hi")
    manager.redact_latest_message(redaction("removed"), first)

asyncio.run(main())
"""
    assert run_silently(script, server, database) == []
    assert "a private thing" not in str(stored.find_one({"_id": "s"}))


def test_exit_after_recording_what_the_last_turn_would_send(server: str, database: str, stored: Documents) -> None:
    script = """
factory = MongoDBSessionManagerFactory(uri, database)
managers = [factory.create_session_manager(f"s{n}", save_on="invocation") for n in range(5)]
agents = [agent(manager, "hello") for manager in managers]
for each in agents:
    each("hi")

async def main():
    for manager, each in zip(managers, agents):
        each.state.set("seen", True)
        manager.sync_agent(each)

asyncio.run(main())
"""
    assert run_silently(script, server, database) == []
    for number in range(5):
        document = stored.find_one({"_id": f"s{number}"})
        assert document is not None
        assert document["agents"]["agent"]["agent_data"]["state"] == {"seen": True}


@pytest.mark.parametrize(
    "closing",
    ["factory.close", "close_global_factory", "manager.close"],
)
def test_closing_in_an_atexit_handler(server: str, database: str, stored: Documents, closing: str) -> None:
    script = f"""
factory = initialize_global_factory(uri, database)
manager = factory.create_session_manager("s")
atexit.register({closing})
agent(manager, "hello")("hi")
"""
    assert run_silently(script, server, database) == []
    assert conversation(stored, "s") == ["hi", "hello"]


@pytest.mark.parametrize(
    "kind", sampled(["owned", "temporary factory", "borrowed Motor"], "temporary factory", "borrowed Motor")
)
def test_unclosed_managers_are_collected_quietly(server: str, database: str, kind: str) -> None:
    script = f"""
import gc
for _ in range(5):
    {MANAGERS[kind].strip().replace(chr(10), chr(10) + "    ")}
    first = agent(manager, "hello")
    first("hi")
    del manager, first
    gc.collect()
"""
    assert run_silently(script, server, database, *UNCLOSED.get(kind, ())) == []


@pytest.mark.parametrize("kind", sampled(["owned", "factory", "borrowed Motor"], "owned"))
def test_unclosed_async_managers_are_collected_quietly(server: str, database: str, kind: str) -> None:
    script = f"""
import gc
async def main():
    {ASYNC_MANAGERS[kind]}
    first = agent(manager, "hello")
    await first.invoke_async("hi")
    del manager, first
    gc.collect()
for _ in range(3):
    asyncio.run(main())
    gc.collect()
"""
    assert run_silently(script, server, database, *UNCLOSED.get(kind, ())) == []


def test_the_client_of_a_collected_manager_is_closed(
    server: str, database: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    script = """
import gc, pymongo
def connections():
    with pymongo.MongoClient(uri) as client:
        return sum(
            each.get("appName") == "collected"
            for each in client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleConnections": True}}])
        )
for number in range(5):
    manager = MongoDBSessionManager(f"s{number}", uri, database, appName="collected")
    assert connections()
    del manager
    gc.collect()
end = time.monotonic() + 30
while connections():
    assert time.monotonic() < end
    time.sleep(0.05)
"""
    assert run_silently(script, server, database) == []


def test_exit_while_daemon_threads_are_in_the_middle_of_turns(server: str, database: str, stored: Documents) -> None:
    script = """
factory = MongoDBSessionManagerFactory(uri, database)
told = []

def work(number):
    try:
        manager = factory.create_session_manager(f"s{number}")
        mine = agent(manager)
        for turn in range(1000):
            mine(f"turn {turn}")
            say(number, turn)
            told.append(number)
    except BaseException as error:  # the interpreter ends
        say("ended", type(error).__name__)

for number in range(10):
    threading.Thread(target=work, args=(number,), daemon=True).start()
while len(told) < 20:
    time.sleep(0.001)
"""
    ended = run(script, server, database)
    assert "Traceback" not in ended.stderr
    assert "Fatal" not in ended.stderr
    acknowledged = [line.split() for line in ended.output if not line.startswith("ended")]
    assert len(acknowledged) >= 20
    kept = {number: conversation(stored, f"s{number}") for number in {number for number, _ in acknowledged}}
    assert [(n, turn) for n, turn in acknowledged if f"turn {turn}" not in kept[n]] == []


# The threads of the application that outlive its main thread.

OUTLIVING = {
    "thread": """
for number in range(3):
    threading.Thread(target=work, args=(number,)).start()
""",
    "executor": """
from concurrent.futures import ThreadPoolExecutor
executor = ThreadPoolExecutor(2)
for number in range(3):
    executor.submit(work, number)
""",
    "thread that starts threads": """
def start():
    for number in range(3):
        time.sleep(0.2)
        threading.Thread(target=work, args=(number,)).start()
threading.Thread(target=start).start()
""",
}


@pytest.mark.parametrize(
    ("way", "kind"),
    sampled(
        [(way, kind) for way in OUTLIVING for kind in ("sync", "async")],
        *(("thread", "async"), ("executor", "sync"), ("thread that starts threads", "async")),
    ),
)
def test_threads_go_on_with_their_sessions_when_the_main_thread_has_ended(
    server: str, database: str, stored: Documents, way: str, kind: str
) -> None:
    script = f"""
from concurrent.futures import ProcessPoolExecutor
agent(None)  # Strands sets up its tracing, which two threads at once would do twice
factory = MongoDBSessionManagerFactory(uri, database)

def sync_work(number):
    mine = agent(factory.create_session_manager(f"s{{number}}"))
    for turn in range(3):
        mine(f"turn {{turn}}")
        time.sleep(0.05)
    say(number)

async def async_work(number):
    manager = await factory.create_session_manager_async(f"s{{number}}")
    mine = agent(manager)
    for turn in range(3):
        await mine.invoke_async(f"turn {{turn}}")
        await asyncio.sleep(0.05)
    manager.redact_latest_message(redaction("removed"), mine)
    say(number)

work = sync_work if "{kind}" == "sync" else lambda number: asyncio.run(async_work(number))
factory.ping()
{OUTLIVING[way]}
"""
    assert sorted(run_silently(script, server, database)) == list("012")
    for number in range(3):
        kept = conversation(stored, f"s{number}")
        assert kept[::2] == [f"turn {turn}" for turn in range(3)]
        assert kind == "sync" or kept[-1] == "removed"


def test_threads_that_wait_for_the_main_thread_do_not_keep_a_process_from_ending(
    server: str, database: str, stored: Documents
) -> None:
    script = """
main = threading.current_thread()

def joins():
    threading.main_thread().join()
    say("joined")

def joins_by_another_name():
    main.join()
    say("joined")

def asks():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    say("over")

mine = agent(MongoDBSessionManager("s", uri, database))
for watch in (joins, joins_by_another_name, asks):
    threading.Thread(target=watch).start()
mine("one")
"""
    assert sorted(run(script, server, database, timeout=30).output) == ["joined", "joined", "over"]
    assert conversation(stored, "s")[::2] == ["one"]


def test_idle_executors_do_not_keep_a_process_from_ending(server: str, database: str) -> None:
    script = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
manager = MongoDBSessionManager("s", uri, database)
threads = ThreadPoolExecutor(3)
processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
say(processes.submit(abs, -1).result(), threads.submit(abs, -2).result())
"""
    assert run(script, server, database, timeout=30).output == ["1 2"]


def test_sessions_survive_the_io_thread(server: str, database: str, stored: Documents) -> None:
    script = """
from mongodb_session_manager._io import loop as _loop
factory = MongoDBSessionManagerFactory(uri, database)
manager = factory.create_session_manager("s")
mine = agent(manager)
mine("one")
delivered = threading.Event()
async def deliver():
    delivered.set()
notify_later("test", "s", deliver)
assert delivered.wait(30)
_loop._thread.stop(30)
delivered.clear()
mine("two")
notify_later("test", "s", deliver)
assert delivered.wait(30)
other = agent(factory.create_session_manager("other"))
other("three")
"""
    run(script, server, database)
    assert conversation(stored, "s")[::2] == ["one", "two"]
    assert conversation(stored, "other")[::2] == ["three"]


def test_exit_while_tasks_on_a_daemon_thread_are_in_the_middle_of_turns(
    server: str, database: str, stored: Documents
) -> None:
    script = """
factory = MongoDBSessionManagerFactory(uri, database)
told = []

async def work(number):
    manager = await factory.create_session_manager_async(f"s{number}")
    mine = agent(manager)
    for turn in range(1000):
        await mine.invoke_async(f"turn {turn}")
        say(number, turn)
        told.append(number)

async def main():
    await asyncio.gather(*(work(number) for number in range(10)), return_exceptions=True)

threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
while len(told) < 20:
    time.sleep(0.001)
"""
    ended = run(script, server, database)
    assert "Traceback" not in ended.stderr
    acknowledged = [line.split() for line in ended.output]
    kept = {number: conversation(stored, f"s{number}") for number in {number for number, _ in acknowledged}}
    assert [(n, turn) for n, turn in acknowledged if f"turn {turn}" not in kept[n]] == []


def test_exit_with_unsent_changes_and_no_server(server: str, database: str) -> None:
    script = """
from proxy import Proxy

with Proxy(uri) as proxy:
    options = {"serverSelectionTimeoutMS": 300}
    managers = [MongoDBSessionManager(f"s{n}", proxy.uri, database, **options) for n in range(3)]
    agents = [agent(manager, "hello") for manager in managers]
    for each in agents:
        each("hi")

async def main():
    for manager, each in zip(managers, agents):
        manager.redact_latest_message(redaction("removed"), each)
    say("recorded")

asyncio.run(main())
"""
    ended = run(script, server, database)
    assert ended.output == ["recorded"]


def test_exit_with_unsent_changes_and_a_server_that_does_not_answer(server: str, database: str) -> None:
    script = """
manager = MongoDBSessionManager("s", uri, database, appName="frozen", socketTimeoutMS=1000)
first = agent(manager, "hello")
first("hi")
say("ready")
from pymongo import MongoClient
with MongoClient(uri) as client:
    client.admin.command({
        "configureFailPoint": "failCommand", "mode": {"times": 100},
        "data": {"failCommands": ["update"], "appName": "frozen", "blockConnection": True, "blockTimeMS": 25_000},
    })

async def main():
    manager.redact_latest_message(redaction("removed"), first)
    say("recorded")

asyncio.run(main())
time.sleep(0.5)  # the command is on its way
"""
    try:
        ended = run(script, server, database, timeout=60)
    finally:
        with pymongo.MongoClient(server) as client:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    assert ended.output == ["ready", "recorded"]


# Forking.

FORK = """
def in_child(work, leave):
    # Fork; the child does `work` and leaves with status 0, or with 1 if that failed.
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        leave(0)
    return pid

def joined(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""

LEAVE = ("sys.exit", "os._exit")


@posix
@pytest.mark.parametrize(
    ("factory", "leave"),
    [
        ("MongoDBSessionManagerFactory(uri, database)", "os._exit"),
        ("initialize_global_factory(uri, database)", "sys.exit"),
    ],
)
def test_fork_after_the_factory_was_used(
    server: str, database: str, stored: Documents, factory: str, leave: str
) -> None:
    script = f"""{FORK}
factory = {factory}
agent(factory.create_session_manager("shared"), "from the parent")("before")
mine = agent(factory.create_session_manager("parent"), "one", "two", "three")
mine("before")

def child():
    agent(factory.create_session_manager("child"), "hello")("in the child")
    agent(factory.create_session_manager("shared"), "from the child")("and on")
    async def main():
        manager = await factory.create_session_manager_async("child")
        await agent(manager, "again").invoke_async("and async")
    asyncio.run(main())

pid = in_child(child, {leave})
mine("while")
joined(pid)
mine("after")
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    assert conversation(stored, "parent") == ["before", "one", "while", "two", "after", "three"]
    assert conversation(stored, "child") == ["in the child", "hello", "and async", "again"]
    assert conversation(stored, "shared") == ["before", "from the parent", "and on", "from the child"]


@posix
def test_fork_before_the_factory_was_used(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
factory = initialize_global_factory(uri, database)
pids = [
    in_child(lambda: agent(get_global_factory().create_session_manager(f"child {{n}}"), "hello")("hi"), leave)
    for n, leave in enumerate([{", ".join(LEAVE)}])
]
for pid in pids:
    joined(pid)
agent(factory.create_session_manager("parent"), "hello")("hi")
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    for session in ("child 0", "child 1", "parent"):
        assert conversation(stored, session) == ["hi", "hello"]


@posix
def test_the_child_closes(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
factory = initialize_global_factory(uri, database)
manager = factory.create_session_manager("parent")
mine = agent(manager, *"01234")
mine("before")

def child(close, used):
    if used:
        agent(factory.create_session_manager("child"), "hello")("hi")
    close()

for close, used in [
    (factory.close, True),
    (factory.close, False),
    (lambda: asyncio.run(factory.close_async()), True),
    (manager.close, False),
]:
    joined(in_child(lambda: child(close, used), sys.exit))
    mine("after")
factory.close()
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    assert conversation(stored, "parent") == ["before", "0", "after", "1", "after", "2", "after", "3", "after", "4"]
    assert conversation(stored, "child") == ["hi", "hello"] * 2


@posix
def test_a_child_takes_over_a_session_of_its_parent(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
for number, leave in enumerate([{", ".join(LEAVE)}]):
    manager = MongoDBSessionManager(f"s{{number}}", uri, database)
    handed_over = agent(manager, "one", "two", "three")
    handed_over("before")
    joined(in_child(lambda: handed_over("in the child"), leave))
other = MongoDBSessionManager("other", uri, database)
agent(other, "hello")("in the parent")
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    for session in ("s0", "s1"):
        assert conversation(stored, session) == ["before", "one", "in the child", "two"]
    assert conversation(stored, "other") == ["in the parent", "hello"]


@posix
def test_a_child_forks_again(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
factory = MongoDBSessionManagerFactory(uri, database)

def turn(session):
    agent(factory.create_session_manager(session), "hello")("hi")

def child():
    turn("child")
    joined(in_child(lambda: turn("grandchild"), sys.exit))
    turn("child again")

turn("parent")
joined(in_child(child, sys.exit))
turn("parent again")
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    for session in ("parent", "child", "grandchild", "child again", "parent again"):
        assert conversation(stored, session) == ["hi", "hello"]


@posix
def test_fork_inside_a_running_event_loop(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
factory = MongoDBSessionManagerFactory(uri, database)

async def turn(session):
    async with await factory.create_session_manager_async(session) as manager:
        await agent(manager, "hello").invoke_async("hi")

async def main():
    await turn("before")
    # asyncio itself does not go on in the child, so the child is synchronous and never returns to the loop.
    pid = in_child(lambda: agent(factory.create_session_manager("child"), "hello")("hi"), os._exit)
    await turn("after")
    await asyncio.to_thread(joined, pid)

asyncio.run(main())
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    for session in ("before", "child", "after"):
        assert conversation(stored, session) == ["hi", "hello"]


@posix
@pytest.mark.parametrize("bound", ["library", "application"])
def test_a_borrowed_client_is_refused_in_a_child(server: str, database: str, bound: str) -> None:
    script = f"""{FORK}
client = AsyncIOMotorClient(uri)
loop = asyncio.new_event_loop()

async def use():
    await client.admin.command("ping")

if {bound == "application"}:
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(use(), loop).result()
factory = MongoDBSessionManagerFactory(client=client, database_name=database)
agent(factory.create_session_manager("parent"), "hello")("hi")

def child():
    try:
        factory.create_session_manager("child")
    except EventLoopError:
        pass
    else:
        raise AssertionError("it worked")

joined(in_child(child, os._exit))
agent(factory.create_session_manager("parent"), "hello")("hi")
factory.close()
if {bound == "application"}:
    loop.call_soon_threadsafe(loop.stop)
    while loop.is_running():
        time.sleep(0.01)
loop.close()
"""
    assert run_silently(script, server, database, FORK_WARNING, *UNCLOSED["borrowed Motor"]) == []


@posix
def test_multiprocessing_fork(server: str, database: str, stored: Documents) -> None:
    script = """
import multiprocessing

def child(number):
    manager = get_global_factory().create_session_manager(f"child {number}")
    mine = agent(manager, "one", "two")
    mine("first")
    mine("second")

initialize_global_factory(uri, database)
mine = agent(get_global_factory().create_session_manager("parent"), "one", "two")
mine("first")
fork = multiprocessing.get_context("fork")
children = [fork.Process(target=child, args=(number,)) for number in range(2)]
for process in children:
    process.start()
mine("second")
for process in children:
    process.join()
    assert process.exitcode == 0, process.exitcode
"""
    assert run_silently(script, server, database, FORK_WARNING) == []
    for session in ("parent", "child 0", "child 1"):
        assert conversation(stored, session) == ["first", "one", "second", "two"]


@posix
def test_fork_while_threads_of_the_parent_are_writing(server: str, database: str, stored: Documents) -> None:
    script = f"""{FORK}
agent(None)  # Strands sets up its tracing, which two threads at once would do twice
factory = MongoDBSessionManagerFactory(uri, database)
end = threading.Event()
told = [0] * 4

def work(number):
    repository = factory.create_session_manager(f"parent {{number}}")
    while not end.is_set() and told[number] < 12:
        agent(repository, "yes", agent_id=f"agent{{told[number]}}")("turn")
        told[number] += 1

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
while not all(told):
    time.sleep(0.001)
for number, leave in enumerate([{", ".join(LEAVE)}, lambda status: (factory.close(), sys.exit(status))]):
    def child():
        agent(factory.create_session_manager(f"child {{number}}"), "hello")("hi")
    joined(in_child(child, leave))
    say("child", number)
end.set()
for thread in threads:
    thread.join()
say("told", *told)
"""
    *children, told = run_silently(script, server, database, FORK_WARNING)
    assert children == [f"child {number}" for number in range(3)]
    for number in range(3):
        assert conversation(stored, f"child {number}") == ["hi", "hello"]
    for number, turns in enumerate(map(int, told.split()[1:])):
        document = stored.find_one({"_id": f"parent {number}"})
        assert document is not None
        assert {key: texts(value["messages"]) for key, value in document["agents"].items()} == {
            f"agent{turn}": ["turn", "yes"] for turn in range(turns)
        }


# Closing while busy, in this process.

BUSY = 12


class Turns:
    """Counts what was acknowledged and what was refused."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[str, str, str]] = []
        self.refused: list[BaseException] = []
        self.begun = 0

    def check(self, stored: Documents) -> None:
        assert [error for error in self.refused if not isinstance(error, MongoDBSessionError)] == []
        kept = {document["_id"]: document["agents"] for document in stored.find()}
        assert [
            (session, key, text)
            for session, key, text in self.acknowledged
            if text not in texts(kept[session][key]["messages"])
        ] == []


def slow_writes(server: str) -> Any:
    return fail_point(server, failCommands=["update"], blockConnection=True, blockTimeMS=20, times=1_000_000)


@pytest.mark.parametrize(
    "way",
    sampled(
        ["factory", "manager", "manager twice", "async manager", "async factory"],
        *("factory", "manager twice", "async manager"),
    ),
)
def test_closing_while_threads_write(
    server: str, database: str, stored: Documents, factory: MongoDBSessionManagerFactory, way: str
) -> None:
    turns = Turns()
    session: Any
    if way.startswith("async"):
        session = asyncio.run(factory.create_session_manager_async("s"))
    else:
        session = factory.create_session_manager("s")

    def work(number: int) -> None:
        key = f"agent{number}"
        try:
            mine = agent(session, agent_id=key)
            for turn in range(50):
                turns.begun += 1
                mine(f"turn {turn}")
                turns.acknowledged.append(("s", key, f"turn {turn}"))
        except BaseException as error:
            turns.refused.append(error)

    close: dict[str, Callable[[], Any]] = {
        "factory": factory.close,
        "manager": session.close,
        "manager twice": lambda: close_at_once(session.close),
        "async manager": lambda: asyncio.run(session.close()),
        "async factory": lambda: asyncio.run(factory.close_async()),
    }
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(BUSY)]
    with slow_writes(server):
        for thread in threads:
            thread.start()
        eventually(lambda: len(turns.acknowledged) >= 10)
        close[way]()
        for thread in threads:
            thread.join(60)
    assert [thread for thread in threads if thread.is_alive()] == []
    assert len(turns.refused) == BUSY
    turns.check(stored)


def close_at_once(close: Callable[[], None]) -> None:
    threads = [threading.Thread(target=close) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def until(condition: Callable[[], object]) -> None:
    """Wait on a running event loop until `condition()` is true."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@pytest.mark.anyio
@pytest.mark.parametrize("way", sampled(["factory", "manager", "manager twice"], "manager twice"))
async def test_closing_while_tasks_write(
    server: str, database: str, stored: Documents, factory: MongoDBSessionManagerFactory, way: str
) -> None:
    turns = Turns()
    session = await factory.create_session_manager_async("s")

    async def work(number: int) -> None:
        key = f"agent{number}"
        try:
            mine = agent(session, agent_id=key)
            for turn in range(50):
                await mine.invoke_async(f"turn {turn}")
                turns.acknowledged.append(("s", key, f"turn {turn}"))
        except Exception as error:
            turns.refused.append(error)

    close: dict[str, Callable[[], Any]] = {
        "factory": factory.close_async,
        "manager": session.close,
        "manager twice": lambda: asyncio.gather(session.close(), session.close(), factory.close_async()),
    }
    with slow_writes(server):
        tasks = [asyncio.create_task(work(number)) for number in range(BUSY)]
        await until(lambda: len(turns.acknowledged) >= 10)
        await close[way]()
        done, waiting = await asyncio.wait(tasks, timeout=60)
    assert (len(done), len(waiting)) == (BUSY, 0)
    assert len(turns.refused) == BUSY
    turns.check(stored)


def test_closing_while_many_sessions_write(
    server: str, stored: Documents, factory: MongoDBSessionManagerFactory
) -> None:
    turns = Turns()

    def work(number: int) -> None:
        session = f"s{number}"
        try:
            mine = agent(factory.create_session_manager(session))
            for turn in range(50):
                mine(f"turn {turn}")
                turns.acknowledged.append((session, "agent", f"turn {turn}"))
        except BaseException as error:
            turns.refused.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(BUSY)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(turns.acknowledged) >= 10)
    factory.close()
    for thread in threads:
        thread.join(60)
    assert [thread for thread in threads if thread.is_alive()] == []
    assert len(turns.refused) == BUSY
    turns.check(stored)


def test_closing_a_repository_while_threads_write(server: str, database: str, stored: Documents) -> None:
    from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

    repository = MongoDBSessionRepository(server, database)
    acknowledged: list[tuple[int, int]] = []
    refused: list[BaseException] = []

    def work(number: int) -> None:
        try:
            repository.create_session(Session(session_id=f"s{number}", session_type=SessionType.AGENT))
            repository.create_agent(
                f"s{number}", SessionAgent(agent_id="agent", state={}, conversation_manager_state={})
            )
            for turn in range(100):
                message = SessionMessage({"role": "user", "content": [{"text": f"turn {turn}"}]}, turn)
                repository.create_message(f"s{number}", "agent", message)
                acknowledged.append((number, turn))
        except BaseException as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(20)]
    with slow_writes(server):
        for thread in threads:
            thread.start()
        eventually(lambda: len(acknowledged) >= 20)
        repository.close()
        for thread in threads:
            thread.join(60)
    assert [thread for thread in threads if thread.is_alive()] == []
    assert [error for error in refused if not isinstance(error, MongoDBSessionError)] == []
    assert len(refused) == 20
    kept = {document["_id"]: document.get("agents", {}) for document in stored.find()}
    assert [
        (number, turn)
        for number, turn in acknowledged
        if f"turn {turn}" not in texts(kept[f"s{number}"]["agent"]["messages"])
    ] == []


def test_closing_twice(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager = factory.create_session_manager("s")
    agent(manager, "hello")("hi")
    manager.close()
    manager.close()
    factory.close()
    factory.close()
    manager.close()
    assert conversation(stored, "s") == ["hi", "hello"]


@pytest.mark.anyio
async def test_closing_twice_async(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager = await factory.create_session_manager_async("s")
    await agent(manager, "hello").invoke_async("hi")
    await manager.close()
    await manager.close()
    await factory.close_async()
    await factory.close_async()
    await manager.close()
    assert conversation(stored, "s") == ["hi", "hello"]


def test_the_second_of_two_closers_returns_when_all_is_stored(
    server: str, stored: Documents, factory: MongoDBSessionManagerFactory
) -> None:
    manager = factory.create_session_manager("s")
    first = agent(manager, "a private thing")
    first("hi")

    async def record() -> None:
        manager.redact_latest_message({"role": "assistant", "content": [{"text": "removed"}]}, first)

    with fail_point(server, failCommands=["update"], blockConnection=True, blockTimeMS=500):
        asyncio.run(record())
        closer = threading.Thread(target=manager.close)
        closer.start()
        eventually(lambda: "closed" in repr(manager))
        manager.close()
        document = stored.find_one({"_id": "s"})
        closer.join()
    assert "a private thing" not in str(document)
