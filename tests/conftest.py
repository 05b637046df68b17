from __future__ import annotations

import gc
import importlib
import os
import random
import shutil
import sys
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pymongo
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings

from fix_progress import Progress
from fix_servers import Server
from mongodb_session_manager import MongoDBSessionManagerFactory
from support import CommandLog, chance, eventually

SharedFactory = tuple[MongoDBSessionManagerFactory, CommandLog]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-adversity", action="store_true", help="fail over ten times and kill twenty processes instead of a few"
    )
    parser.addoption("--seeds", help="which changed exports are imported: the first seed, a plus sign, and how many")
    parser.addoption(
        "--full-conformance", action="store_true", help="resume each cut of a conversation in every way, not in one"
    )


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("full_adversity") or config.getoption("full_conformance")
    settings.register_profile(
        "here", max_examples=300 if full else 30, deadline=None, suppress_health_check=HealthCheck
    )
    settings.load_profile("here")


HERE = Path(__file__).parent
MODULES = """
aws/test_messages test_attachments_references test_call_chain test_changes test_codec test_commands test_demo
test_documents test_errors test_feedback test_ids test_legacy test_odd_values test_options test_portable
test_rollback test_strict_api test_surface test_turns test_unit_of_work test_wrong_arguments
"""
FAST = {HERE / f"{name}.py" for name in MODULES.split()}
"""The modules whose tests are marked `fast`: pure, or with one server and no other process."""

NOT_FAST = ("later_process", "importing_the_package", "standalone")
"""Parts of the names of their tests that start a process or a further server all the same."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the fast tests with two workers at most: each further one takes as long to start as it saves."""
    if config.getoption("markexpr") == "fast" and isinstance(count := config.getoption("numprocesses", None), int):
        config.option.numprocesses = min(count, 2)


LONGEST = """
chat_page embedded process odd_documents matrix connection fastapi examples_run retention staging forking copying
"""
"""The modules, without `test_`, that a worker begins with, so that none is left to one worker in the end."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing that `-m fast` would leave out: that took most of the time."""
    left_out = HERE in collection_path.parents and not any(
        collection_path in (module, *module.parents) for module in FAST
    )
    return True if left_out and config.getoption("markexpr") == "fast" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is fast, put the longest modules first, and leave out what only `--full-adversity` runs."""
    names = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))
    for item in items:
        if item.path in FAST and not any(part in item.name for part in NOT_FAST):
            item.add_marker("fast")
    if not config.getoption("full_adversity"):
        left_out = {*not_drawn(items), *(item for item in items if item.get_closest_marker("full_adversity"))}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def not_drawn(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the cases that are not drawn, of the tests with parameters from `support.halves`."""
    cases: dict[str, list[tuple[int, pytest.Item]]] = defaultdict(list)
    for item in items:
        if numbers := [mark.args[0] for mark in item.iter_markers("half")]:
            cases[item.nodeid.partition("[")[0]].append((sum(numbers) % 2, item))
    random = chance()
    for test in sorted(cases):
        drawn = random.randrange(2)
        yield from (item for half, item in cases[test] if half != drawn)


sys.dont_write_bytecode = False
"""What is compiled is kept, whatever the environment says: it takes a worker longer than to collect all tests."""


def _import_in_another_order(config: pytest.Config) -> None:
    """Have each worker begin with other modules, so that it finds the rest compiled by the others."""
    worker = getattr(config, "workerinput", None)
    if worker is None or config.args != config.getini("testpaths"):
        return
    modules = sorted(FAST if config.getoption("markexpr") == "fast" else HERE.rglob("test_*.py"))
    first = len(modules) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in modules[first:] + modules[:first]:
            with suppress(BaseException):  # it is imported again, where failures are reported
                importlib.import_module(module.stem)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Leave what is imported and collected to itself: it stays, and the garbage collector need not look at it."""
    gc.disable()
    try:
        _import_in_another_order(session.config)
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is not None:
        session.config.pluginmanager.register(Progress(reporter))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def detector() -> BlockBuster:
    """Made once per module: that takes as long as to run an empty test."""
    return BlockBuster("mongodb_session_manager", excluded_modules=["mongodb_session_manager.demo"])


@pytest.fixture(autouse=True)
def blocking_calls_are_errors(request: pytest.FixtureRequest, detector: BlockBuster) -> Iterator[BlockBuster | None]:
    """Fail a test in which the package blocks a running event loop, its own included; Strands reads files on it."""
    if request.node.get_closest_marker("may_block"):
        yield None
        return
    detector.activate()
    try:
        yield detector
    finally:
        detector.deactivate()


@pytest.fixture
def some(request: pytest.FixtureRequest) -> Callable[[Iterable[Any], int], list[Any]]:
    """Choose so many of many cases, others in each run; `--full-adversity` has all of them."""
    full = request.config.getoption("full_adversity")
    return lambda cases, count: list(cases) if full else random.sample(list(cases), count)


@pytest.fixture(scope="session", autouse=True)
def retries_come_fast() -> Iterator[None]:
    """Have the driver look for a lost server at once, and the library send again sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.02)
        patch.setattr("pymongo.network_layer._POLL_TIMEOUT", 0.02)
        patch.setattr("mongodb_session_manager._io.collection._PAUSES", (0.01, 0.02, 0.05))
        yield


@pytest.fixture(scope="session")
def kept_in_memory() -> Iterator[None]:
    """Have servers keep their data in memory where there is room: most tests make a database with all its indexes."""
    memory = Path("/dev/shm")
    with pytest.MonkeyPatch.context() as patch:
        if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30:
            patch.setattr("tempfile.tempdir", str(memory))
        yield


@pytest.fixture(scope="session")
def embedded(kept_in_memory: None) -> Iterator[str]:
    with Server(server_parameters={"enableTestCommands": 1}) as server:
        yield server.connection_string


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> str:
    """The connection string of the server under test: `MONGODB_URI`, else an embedded replica set of one."""
    return os.environ.get("MONGODB_URI") or request.getfixturevalue("embedded")


@pytest.fixture(scope="session")
def standalone(kept_in_memory: None) -> Iterator[str]:
    """The connection string of a server without a replica set, where the driver retries nothing."""
    with Server(standalone=True, server_parameters={"enableTestCommands": 1}) as server:
        yield server.connection_string


@pytest.fixture(scope="session")
def expiring(kept_in_memory: None) -> Iterator[str]:
    """The connection string of a server that looks for what has expired every second."""
    with Server(server_parameters={"enableTestCommands": 1, "ttlMonitorSleepSecs": 1}) as server:
        yield server.connection_string


@pytest.fixture(scope="session")
def driver(server: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A plain client, to look at what is stored and to write what others would."""
    with pymongo.MongoClient[dict[str, Any]](server, tz_aware=True) as client:
        yield client


@pytest.fixture(scope="session")
def drop_later(driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Callable[[str], None]]:
    """Drop databases while tests go on: a replica set takes a tenth of a second for each."""
    drops: list[Future[None]] = []
    with ThreadPoolExecutor(1) as dropping:
        yield lambda name: drops.append(dropping.submit(driver.drop_database, name))
    for drop in drops:
        drop.result()


@pytest.fixture(scope="session")
def shared_database(server: str, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[str]:
    """The name of a database with all its indexes: to delete what is in it takes a hundredth of making another."""
    name, log = f"test_{uuid.uuid4().hex}", CommandLog()
    with MongoDBSessionManagerFactory(server, name, event_listeners=[log]) as factory:
        factory.list_sessions()
        log.wait_for_start()
    yield name
    driver.drop_database(name)


@pytest.fixture
def database(request: pytest.FixtureRequest, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[str]:
    """The name of a database with nothing in it but indexes; marked `own_database`: of one that nobody has used."""
    if request.node.get_closest_marker("own_database"):
        name, drop = f"test_{uuid.uuid4().hex}", request.getfixturevalue("drop_later")
        yield name
        drop(name)
        return
    name = request.getfixturevalue("shared_database")
    collections = driver[name].list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    assert "agent_sessions" in collections, "a test that drops its database needs the marker own_database"
    for collection in collections:
        driver[name][collection].delete_many({})
    yield name


@pytest.fixture
def stored(driver: pymongo.MongoClient[dict[str, Any]], database: str) -> pymongo.collection.Collection[dict[str, Any]]:
    """The sessions of the test as they are stored."""
    return driver[database]["agent_sessions"]


@pytest.fixture
def large(driver: pymongo.MongoClient[dict[str, Any]]) -> None:
    """Give the server room for documents of 16 MB; an embedded one has little."""
    driver.admin.command({"setParameter": 1, "wiredTigerEngineRuntimeConfig": "cache_size=1G"})


def shares_factory(request: pytest.FixtureRequest) -> bool:
    """Return whether a test uses the factory of its module."""
    marked = request.node.get_closest_marker
    return marked("shared_factory") is not None and marked("own_database") is None


@pytest.fixture(scope="module")
def shared_factory(server: str, shared_database: str) -> Iterator[Callable[[], SharedFactory]]:
    """Return the factory of the module and the log of its commands; another factory once a test has closed it."""
    made: list[SharedFactory] = []

    def shared() -> SharedFactory:
        if not made or made[-1][0]._connection.closed:
            log = CommandLog()
            made.append((MongoDBSessionManagerFactory(server, shared_database, event_listeners=[log]), log))
        return made[-1]

    yield shared
    for factory, _ in made:
        factory.close()


@pytest.fixture
def commands(request: pytest.FixtureRequest) -> CommandLog:
    """The commands that the clients it is passed to have sent."""
    shared = shares_factory(request) and "factory" in request.fixturenames
    return request.getfixturevalue("shared_factory")()[1] if shared else CommandLog()


@pytest.fixture
def factory(
    request: pytest.FixtureRequest, server: str, database: str, commands: CommandLog
) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory whose client is connected and whose indexes are built, so that only sessions' commands are counted.

    Marked `shared_factory`: the one factory of the module, which saves a test 20 ms of processor time.
    """
    with ExitStack() as stack:
        if shares_factory(request):
            factory = request.getfixturevalue("shared_factory")()[0]
        else:
            factory = stack.enter_context(MongoDBSessionManagerFactory(server, database, event_listeners=[commands]))
        factory.list_sessions()  # before there is a document: indexes take the server a third of the time
        eventually(lambda: not factory._connection._tasks)
        commands.clear()
        yield factory
        eventually(lambda: not factory._connection._tasks)  # before the next test empties the database


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """Have what is left over complain; what is still in use is not looked at again: that took half of all the time."""
    yield
    gc.collect()
    gc.freeze()
