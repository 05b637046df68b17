"""A server that refuses, or is not there: found at the start, told in one sentence."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient

from mongodb_session_manager import (
    AccessDeniedError,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidArgumentError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionClosedError,
    create_mongodb_session_manager_async,
)
from secured import PASSWORD, certificates, mongod, unused_port, with_users
from support import alternating

WRONG = "hunter3wrong"


@pytest.fixture(scope="module")
def secured(kept_in_memory: None) -> Iterator[str]:
    with with_users() as host:
        yield host


def uri(host: str, user: str, password: str = PASSWORD, **options: str) -> str:
    options |= {"serverMonitoringMode": "poll"}  # a lost server is looked for at once
    more = "".join(f"&{name}={value}" for name, value in options.items())
    return f"mongodb://{user}:{quote(password, safe='')}@{host}/support?authSource=admin&directConnection=true{more}"


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def check_sentence(error: BaseException, *words: str) -> None:
    sentence = str(error)
    for word in words:
        assert word in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400
    for secret in (PASSWORD, WRONG, "OperationFailure", "execute command"):
        assert secret not in shown(error)


async def first_use(connection_string: str) -> None:
    async with await create_mongodb_session_manager_async("s", connection_string):
        pass


def use_repository(connection_string: str) -> None:
    with MongoDBSessionRepository(connection_string) as repository:
        repository.read_session("s")


def ping(connection_string: str) -> None:
    with MongoDBSessionManagerFactory(connection_string) as factory:
        factory.ping()


def check(connection_string: str) -> None:
    with MongoDBSessionManagerFactory(connection_string) as factory:
        factory.check()


async def check_async(connection_string: str) -> None:
    async with MongoDBSessionManagerFactory(connection_string) as factory:
        await factory.check_async()


USES: dict[str, Callable[[str], Any]] = {
    "manager": lambda uri: MongoDBSessionManager("s", uri).close(),
    "async manager": lambda uri: asyncio.run(first_use(uri)),
    "repository": use_repository,
    "check": check,
    "check_async": lambda uri: asyncio.run(check_async(uri)),
}


@pytest.mark.parametrize("use", [*USES.values(), ping], ids=[*USES, "ping"])
def test_a_wrong_password_is_one_sentence_at_any_first_use(secured: str, use: Callable[[str], Any]) -> None:
    with pytest.raises(AccessDeniedError) as raised:
        use(uri(secured, "reader", WRONG))
    check_sentence(raised.value, "'reader'", secured, "'admin'", "password", "authSource")
    assert isinstance(raised.value, ConfigurationError)
    assert isinstance(raised.value, PermissionError)


@pytest.mark.parametrize("use", alternating(*USES.values()), ids=USES)
@pytest.mark.parametrize(
    ("connection_string", "words"),
    alternating(
        (lambda host: uri(host, "nobody"), ["'nobody'", "authenticate"]),
        (lambda host: uri(host, "reader").replace("authSource=admin", "authSource=other"), ["'other'", "authSource"]),
        (lambda host: uri(host, "reader", authMechanism="PLAIN"), ["'reader'", "authMechanism"]),
        (
            lambda host: f"mongodb://{host}/support?directConnection=true",
            ["requires authentication", "connection_string"],
        ),
        (lambda host: uri(host, "stranger"), ["'stranger'", "'support'", "readWrite"]),
    ),
    ids=["user", "authSource", "mechanism", "no user", "no role"],
)
def test_another_refusal_is_one_sentence(
    secured: str, connection_string: Callable[[str], str], words: list[str], use: Callable[[str], Any]
) -> None:
    with pytest.raises(AccessDeniedError) as raised:
        use(connection_string(secured))
    check_sentence(raised.value, secured, *words)


def test_a_user_who_may_only_read_is_told_at_the_first_write(secured: str) -> None:
    check(uri(secured, "reader"))
    with pytest.raises(AccessDeniedError) as raised:
        MongoDBSessionManager("s", uri(secured, "reader"))
    check_sentence(raised.value, "'reader'", "'support'", "readWrite")


def test_a_user_who_may_only_read_and_write_changes_how_long_sessions_live(secured: str) -> None:
    with pymongo.MongoClient(uri(secured, "writer"), tz_aware=True) as client:
        stored = client["support"]["agent_sessions"]
        for hours in (1, 9):
            options: Any = {"session_ttl": timedelta(hours=hours)}
            with MongoDBSessionRepository(uri(secured, "writer"), **options) as repository:
                repository.open_session("s")
                repository.update_metadata("s", {"hours": hours})
            assert stored.find_one()["expires_at"] >= datetime.now(UTC) + timedelta(hours=hours)
        assert stored.index_information()["expires_at_1"]["expireAfterSeconds"] == 0
        stored.delete_many({})


def test_a_user_given_as_client_options_is_named(secured: str) -> None:
    options = {"username": "reader", "password": WRONG, "authSource": "admin", "directConnection": True}
    with pytest.raises(AccessDeniedError) as raised:
        MongoDBSessionManager("s", f"mongodb://{secured}/", **options)
    check_sentence(raised.value, "'reader'", secured, "'admin'")


@pytest.mark.anyio
@pytest.mark.may_block
@pytest.mark.parametrize("driver_class", [AsyncIOMotorClient, AsyncMongoClient])
async def test_the_user_of_a_borrowed_client_is_named(secured: str, driver_class: Any) -> None:
    client = driver_class(uri(secured, "reader", WRONG))
    try:
        factory = MongoDBSessionManagerFactory(client=client)
        for use in (factory.check_async, lambda: factory.create_session_manager_async("s")):
            with pytest.raises(AccessDeniedError) as raised:
                await use()
            check_sentence(raised.value, "'reader'", secured)
    finally:
        if (closing := client.close()) is not None:
            await closing


def test_the_password_is_not_logged(secured: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mongodb_session_manager")
    for use in USES.values():
        with pytest.raises(AccessDeniedError):
            use(uri(secured, "reader", WRONG))
    assert WRONG not in caplog.text


@pytest.mark.own_database
def test_a_factory_that_may_be_used_passes_its_check(server: str, database: str, stored: Any) -> None:
    with MongoDBSessionManagerFactory(server, database) as factory:
        factory.check()
        factory.check(timeout=30)
        asyncio.run(factory.check_async(timeout=10))
    assert stored.database.list_collection_names() == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", None, True])
def test_a_check_needs_a_time_limit(factory: MongoDBSessionManagerFactory, timeout: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout must be"):
        factory.check(timeout)


def test_a_closed_factory_fails_its_check(server: str) -> None:
    factory = MongoDBSessionManagerFactory(server)
    factory.close()
    with pytest.raises(SessionClosedError):
        factory.check()


@pytest.mark.anyio
async def test_no_server_is_found_within_the_time_limit() -> None:
    address = f"127.0.0.1:{unused_port()}"
    async with MongoDBSessionManagerFactory(f"mongodb://user:{WRONG}@{address}/") as factory:
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailableError) as raised:
            await factory.check_async(timeout=0.5)
        assert time.monotonic() - begun < 10  # the driver's own limit is 30 s
    assert address in str(raised.value)
    assert WRONG not in str(raised.value)
    assert "configured timeouts" not in str(raised.value)


@pytest.mark.anyio
@pytest.mark.may_block
async def test_a_server_of_a_borrowed_client_that_does_not_answer_is_given_up_within_the_time_limit() -> None:
    # It accepts connections: AsyncMongoClient leaks the socket of a connection attempt that its `close` cancels.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client: AsyncMongoClient[Any] = AsyncMongoClient(f"mongodb://127.0.0.1:{silent.getsockname()[1]}/")
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailableError):
            await MongoDBSessionManagerFactory(client=client).check_async(timeout=0.5)
        assert time.monotonic() - begun < 10
        await client.close()


# TLS.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificates of the server and of somebody else."""
    directory = tmp_path_factory.mktemp("certificates")
    return certificates(directory / "server"), certificates(directory / "other")


@pytest.fixture(scope="module")
def encrypted(kept_in_memory: None, files: tuple[Path, Path]) -> Iterator[str]:
    own = files[0]
    options = {"tls": True, "tlsCAFile": str(own / "ca.pem"), "tlsCertificateKeyFile": str(own / "key.pem")}
    arguments = ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(own / "key.pem")]
    arguments += ["--tlsCAFile", str(own / "ca.pem")]
    with mongod(*arguments, tlsAllowInvalidHostnames=True, **options) as host:
        yield host.replace("127.0.0.1", "localhost")


def connect(host: str, timeout: float = 2, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.5)  # as it is by default: each handshake takes 10 ms
        with MongoDBSessionManagerFactory(f"mongodb://{host}/?directConnection=true", **options) as factory:
            factory.check(timeout=timeout)


def test_tls_that_fits(encrypted: str, files: tuple[Path, Path]) -> None:
    own = files[0]
    connect(encrypted, 30, tls=True, tlsCAFile=str(own / "ca.pem"), tlsCertificateKeyFile=str(own / "key.pem"))


@pytest.mark.parametrize("authority", ["another", "none", "another host"])
def test_a_certificate_that_cannot_be_verified_is_a_matter_of_configuration(
    encrypted: str, files: tuple[Path, Path], authority: str
) -> None:
    own, other = files
    options: dict[str, Any] = {"tls": True, "tlsCertificateKeyFile": str(own / "key.pem")}
    if authority != "none":
        options["tlsCAFile"] = str((other if authority == "another" else own) / "ca.pem")
    host = encrypted.replace("localhost", "127.0.0.1") if authority == "another host" else encrypted
    with pytest.raises(ConfigurationError, match=r"TLS.*tlsCAFile") as raised:
        connect(host, **options)
    assert host in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_tls_where_the_server_requires_it(encrypted: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match="agree on TLS"):
        connect(encrypted)


def test_tls_where_the_server_has_none(secured: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match="agree on TLS"):
        connect(secured, tls=True)


def test_a_missing_client_certificate(encrypted: str, files: tuple[Path, Path]) -> None:
    with pytest.raises(DatabaseUnavailableError, match="agree on TLS"):
        connect(encrypted, tls=True, tlsCAFile=str(files[0] / "ca.pem"))


@pytest.mark.anyio
async def test_the_repository_of_a_user_without_a_role(secured: str) -> None:
    async with AsyncMongoDBSessionRepository(uri(secured, "stranger")) as repository:
        with pytest.raises(AccessDeniedError, match="stranger"):
            await repository.read_session("s")
        with pytest.raises(AccessDeniedError, match="stranger"):
            await repository.list_sessions()


def test_a_refused_read_of_the_version_is_told_in_the_stats(secured: str) -> None:
    with MongoDBSessionManagerFactory(uri(secured, "reader", WRONG)) as factory:
        assert "'reader'" in str(factory.get_connection_stats()["error"])


def test_the_server_of_these_tests_takes_the_right_password(secured: str) -> None:
    with pymongo.MongoClient(uri(secured, "root")) as client:
        assert client.admin.command("connectionStatus")["authInfo"]["authenticatedUsers"]
    with MongoDBSessionManager("s", uri(secured, "root")) as manager:
        assert manager.get_metadata() == {"metadata": {}}
