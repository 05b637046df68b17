from __future__ import annotations

import asyncio
import gc
import importlib
import os
import random
import shutil
import socket
import sys
import uuid
import warnings
from asyncio.selector_events import BaseSelectorEventLoop
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pymongo
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fix_progress import Progress
from fix_servers import Server
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import CLIENTS, CommandLog, client_of, eventually, run_random

SharedFactory = tuple[MongoDBSessionManagerFactory, CommandLog]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-adversity", action="store_true", help="run every case of the tests that otherwise run a sample"
    )
    parser.addoption(
        "--seeds", help="the seeds of the damaged exports: the first seed, a plus sign, and the number of seeds"
    )
    parser.addoption(
        "--full-conformance",
        action="store_true",
        help="resume each conversation at every cut in every way, not only in one",
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
"""Parts of the names of tests in these modules that are not fast: they start a process or a further server."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the fast tests with at most two workers: a third one takes as long to start as it saves."""
    if config.getoption("markexpr") == "fast" and isinstance(count := config.getoption("numprocesses", None), int):
        config.option.numprocesses = min(count, 2)


LONGEST = """
chat_page from_v100 process view copying rewinding embedded forking docs write_back life archive_faults examples_run
retention storage fastapi import_streams matrix connection attachments failover session_storage staging owners erasure
deletion archive waiting state_too_large odd_documents multi_agents replaced_attachments life_model factory lease
sessions_router exactness model attachments_too_large server_clock message_pages cancellation access errors finding
conformance owner_export session_dependency killed_erasure loop open_manager metadata
"""
"""The longest modules, without `test_`. They run first, so that none is still running when other workers are idle.

Modules that mostly wait, as `chat_page` and `process` do, alternate with modules that compute.
"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, do not import the modules that have no fast tests: importing them took most of the time."""
    if config.getoption("markexpr") != "fast" or HERE not in collection_path.parents:
        return None
    return None if any(collection_path in (module, *module.parents) for module in FAST) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the fast tests, put the longest modules first, and deselect the cases that only `--full-adversity` runs."""
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
    """Yield the half of the cases that this run leaves out, of each test with parameters from `support.alternating`."""
    cases: dict[str, list[tuple[int, pytest.Item]]] = defaultdict(list)
    for item in items:
        if numbers := [mark.args[0] for mark in item.iter_markers("half")]:
            cases[item.nodeid.partition("[")[0]].append((sum(numbers) % 2, item))
    random = run_random()
    for test in sorted(cases):
        drawn = random.randrange(2)
        yield from (item for half, item in cases[test] if half != drawn)


# Write bytecode even if the environment forbids it: compiling takes a worker longer than collecting all tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _compile_in_parallel(config: pytest.Config) -> None:
    """Import all test modules, in each worker from another one on, so that each worker compiles only some of them.

    When a worker reaches the modules that another worker began with, their bytecode is already on disk.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None or config.args != config.getini("testpaths"):
        return
    modules = sorted(FAST if config.getoption("markexpr") == "fast" else HERE.rglob("test_*.py"))
    first = len(modules) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in modules[first:] + modules[:first]:
            with suppress(BaseException):  # pytest imports it again and reports the failure
                importlib.import_module(module.stem)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Keep imported modules and collected tests out of garbage collection: they stay alive until the end."""
    gc.disable()
    try:
        _compile_in_parallel(session.config)
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@settings(max_examples=1, database=None)
@given(st.text())
def prepare_hypothesis(_: str) -> None:
    """Draw a text, for which Hypothesis stores a table of characters and the constants of the library."""


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        prepare_hypothesis()  # takes two seconds in a new checkout, and would take each worker that long
    if (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is not None:
        session.config.pluginmanager.register(Progress(reporter))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def detector() -> Iterator[BlockBuster]:
    """Detects blocking calls. One per module, because creating it takes as long as running an empty test."""
    detector = BlockBuster("mongodb_session_manager", excluded_modules=["mongodb_session_manager.demo"])
    yield detector
    detector.deactivate()


@pytest.fixture(autouse=True)
def blocking_calls_are_errors(request: pytest.FixtureRequest, detector: BlockBuster) -> BlockBuster | None:
    """Fail a test in which the package blocks a running event loop, its own included; Strands reads files on it."""
    if request.node.get_closest_marker("may_block"):
        detector.deactivate()
        return None
    detector.activate()
    return detector


@pytest.fixture
def some(request: pytest.FixtureRequest) -> Callable[[Iterable[Any], int], list[Any]]:
    """Return a function that draws `count` cases, anew in each run; with `--full-adversity`, it returns all cases."""
    full = request.config.getoption("full_adversity")
    return lambda cases, count: list(cases) if full else random.sample(list(cases), count)


@pytest.fixture(scope="session", autouse=True)
def retries_come_fast() -> Iterator[None]:
    """Shorten the pauses of the driver and the library before they retry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.05)  # less would wake idle clients too often
        patch.setattr("pymongo.network_layer._POLL_TIMEOUT", 0.05)
        patch.setattr("mongodb_session_manager._io.collection._PAUSES", (0.01, 0.02, 0.05))
        yield


@pytest.fixture(scope="session", autouse=True)
def cancelled_connection_attempts_close_their_sockets() -> Iterator[None]:
    """Close what `AsyncMongoClient.close` leaves open when it cancels a connection attempt: later tests would warn."""
    connect = BaseSelectorEventLoop.sock_connect

    async def connect_or_close(loop: BaseSelectorEventLoop, connecting: socket.socket, address: Any) -> None:
        try:
            await connect(loop, connecting, address)
        except asyncio.CancelledError:
            connecting.close()
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseSelectorEventLoop, "sock_connect", connect_or_close)
        yield


@pytest.fixture(scope="session")
def kept_in_memory() -> Iterator[None]:
    """Keep the servers' data in memory if there is room, because most tests create a database with all its indexes."""
    memory = Path("/dev/shm")
    with pytest.MonkeyPatch.context() as patch:
        if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30:
            patch.setattr("tempfile.tempdir", str(memory))
        yield


@pytest.fixture(scope="session")
def embedded(kept_in_memory: None) -> Iterator[str]:
    """The connection string of an embedded server that removes expired documents only during `expiring`."""
    parameters: dict[str, str | int] = {
        "enableTestCommands": 1,
        "ttlMonitorEnabled": "false",
        "ttlMonitorSleepSecs": 1,
    }
    with Server(server_parameters=parameters) as server:
        server.acknowledge_before_journaling()
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


@pytest.fixture
def expiring(embedded: str) -> Iterator[str]:
    """The connection string of a server that removes expired documents every second during the test."""
    with client_of(embedded) as client:
        client.admin.command("setParameter", ttlMonitorEnabled=True)
        yield embedded
        client.admin.command("setParameter", ttlMonitorEnabled=False)


@pytest.fixture(scope="session")
def driver(server: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A plain client, to inspect stored documents and to write as another application would."""
    with pymongo.MongoClient[dict[str, Any]](server, tz_aware=True, serverMonitoringMode="poll") as client:
        CLIENTS[server] = client
        yield client
        del CLIENTS[server]


@pytest.fixture(scope="session")
def drop_later(driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Callable[[str], None]]:
    """Drop databases in the background: on a replica set, each drop takes a tenth of a second."""
    drops: list[Future[None]] = []
    with ThreadPoolExecutor(1) as dropping:
        yield lambda name: drops.append(dropping.submit(driver.drop_database, name))
    for drop in drops:
        drop.result()


@pytest.fixture(scope="session")
def shared_database(server: str, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[str]:
    """The name of a database with all its indexes: emptying it takes a hundredth of the time of creating one."""
    name, log = f"test_{uuid.uuid4().hex}", CommandLog()
    with MongoDBSessionManagerFactory(server, name, event_listeners=[log]) as factory:
        factory.list_sessions()
        log.wait_for_start()
    yield name
    driver.drop_database(name)


@pytest.fixture
def database(request: pytest.FixtureRequest, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[str]:
    """The name of a database that is empty except for its indexes. Marked `own_database`: of a new database."""
    if request.node.get_closest_marker("own_database"):
        name, drop = f"test_{uuid.uuid4().hex}", request.getfixturevalue("drop_later")
        yield name
        drop(name)
        return
    name = request.getfixturevalue("shared_database")
    collections = driver[name].list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    assert "agent_sessions" in collections, "a test that drops its database needs the marker own_database"
    for collection in not_empty(driver[name], collections):
        driver[name][collection].delete_many({})
    yield name


def not_empty(database: pymongo.database.Database[dict[str, Any]], collections: list[str]) -> list[str]:
    """Return the collections that hold a document: one command, which costs less than one per collection."""
    pipelines: list[list[dict[str, Any]]] = [[{"$limit": 1}, {"$project": {"_id": name}}] for name in collections]
    unions = [
        {"$unionWith": {"coll": name, "pipeline": pipeline}}
        for name, pipeline in zip(collections[1:], pipelines[1:], strict=True)
    ]
    return [found["_id"] for found in database[collections[0]].aggregate([*pipelines[0], *unions])]


@pytest.fixture
def stored(driver: pymongo.MongoClient[dict[str, Any]], database: str) -> pymongo.collection.Collection[dict[str, Any]]:
    """The sessions of the test as they are stored."""
    return driver[database]["agent_sessions"]


@pytest.fixture
def large(driver: pymongo.MongoClient[dict[str, Any]]) -> None:
    """Give the server room for documents of 16 MB; an embedded one has little."""
    driver.admin.command({"setParameter": 1, "wiredTigerEngineRuntimeConfig": "cache_size=1G"})


def shares_factory(request: pytest.FixtureRequest) -> bool:
    """Return whether a test uses the factory of its module, which saves 20 ms of processor time."""
    marked = request.node.get_closest_marker
    return marked("own_factory") is None and marked("own_database") is None


@pytest.fixture(scope="module")
def shared_factory(server: str, shared_database: str) -> Iterator[Callable[[], SharedFactory]]:
    """Return a getter of the module's factory and its command log; the getter replaces a factory that was closed."""
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
    """The log of the commands of all clients that it is passed to."""
    shared = shares_factory(request) and "factory" in request.fixturenames
    return request.getfixturevalue("shared_factory")()[1] if shared else CommandLog()


@pytest.fixture
def factory(
    request: pytest.FixtureRequest, server: str, database: str, commands: CommandLog
) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory whose client is connected and whose indexes are built, so that only sessions' commands are counted.

    It is the one factory of the module; marked `own_factory` or `own_database`: a new factory.
    """
    with ExitStack() as stack:
        if shares_factory(request):
            factory = request.getfixturevalue("shared_factory")()[0]
        else:
            factory = stack.enter_context(MongoDBSessionManagerFactory(server, database, event_listeners=[commands]))
        factory.list_sessions()  # in the empty database, where building the indexes takes a third of the time
        eventually(lambda: not factory._connection._tasks)
        commands.clear()
        yield factory
        eventually(lambda: not factory._connection._tasks)  # before the next test empties the database


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    """The options of `shared_repository`, for a module that needs others than the defaults."""
    return {}


@pytest.fixture(scope="module")
def shared_repository(
    server: str, shared_database: str, repository_options: dict[str, Any]
) -> Iterator[MongoDBSessionRepository]:
    """The one repository of the module, because a new one takes as long as twenty operations."""
    with MongoDBSessionRepository(server, shared_database, **repository_options) as repository:
        yield repository


@pytest.fixture
def repository(database: str, shared_repository: MongoDBSessionRepository) -> Iterator[MongoDBSessionRepository]:
    """The repository of the module, over the empty database."""
    yield shared_repository
    eventually(lambda: not shared_repository._async._connection._tasks)  # before the next test empties the database


@pytest.fixture(scope="module", autouse=True)
def no_resource_leaks() -> Iterator[None]:
    """Collect garbage after each module, so that unclosed resources warn; freeze the rest, which is slow to scan."""
    yield
    gc.collect()
    gc.freeze()
