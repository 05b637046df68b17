"""What a type checker says of a user's program: options that exist are known, all others are errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_type_hints

import pymongo
import pytest

import mongodb_session_manager as package

PROGRAM = """
import asyncio
import functools
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pymongo
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.monitoring import CommandListener
from pymongo.server_api import ServerApi

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ManagerOptions,
    MongoDBConnectionPool,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    MongoDBStorage,
    PendingSession,
    chain_hooks,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    initialize_global_factory,
    split_export,
)


def blocking_hook(original_func: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any: ...
async def async_hook(original: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any: ...
def feedback_hook(
    original: Callable[[dict[str, Any]], None], action: str, session_id: str, *, feedback: dict[str, Any]
) -> None: ...
def wrong_hook(original: Callable[..., Any], action: int, session_id: str, **kwargs: Any) -> Any: ...
def long_hook(extra: int, original: Callable[..., Any], action: str, session_id: str, **kwargs: Any) -> Any: ...


class Hook:
    async def __call__(
        self, original: Callable[..., Awaitable[Any]], action: str, session_id: str, **kwargs: Any
    ) -> Any: ...


def valid(listener: CommandListener) -> None:
    MongoDBSessionManager("s", "mongodb://localhost", "database", "sessions", maxPoolSize=5, tls=True, appname="a")
    MongoDBSessionManager("s", serverSelectionTimeoutMS=500, event_listeners=[listener], w="majority")
    MongoDBSessionManager("s", readPreference="nearest", read_preference=pymongo.ReadPreference.NEAREST)
    MongoDBSessionManager("s", server_api=ServerApi("1"), compressors=["zlib"], username="u", password="p")
    MongoDBSessionManager("s", None, None, None, client=None, save_on=None, maxPoolSize=None, session_ttl=None)
    MongoDBSessionManager("s", client=pymongo.MongoClient[dict[str, Any]]())
    MongoDBSessionManager("s", client=pymongo.AsyncMongoClient[dict[str, Any]]())
    MongoDBSessionManager("s", client=AsyncIOMotorClient[dict[str, Any]]())
    MongoDBSessionManager("s", client=MongoDBConnectionPool.get_client())
    MongoDBSessionManager("s", metadata_hook=blocking_hook, feedback_hook=feedback_hook)
    MongoDBSessionManager("s", metadataHook=async_hook, feedbackHook=functools.partial(long_hook, 1))
    MongoDBSessionManager("s", metadata_hook=Hook(), feedback_hook=lambda original, action, session_id, **kw: None)
    MongoDBSessionManager("s", metadata_hook=chain_hooks(blocking_hook, async_hook, None, Hook()))
    AsyncMongoDBSessionManager("s", session_ttl=timedelta(days=1), metadata_fields=["customer"])
    MongoDBSessionRepository(max_embedded_messages=5, maxPoolSize=5)
    AsyncMongoDBSessionRepository(application_name="a", tz_aware=True)
    MongoDBStorage(maxPoolSize=5)
    MongoDBConnectionPool.initialize("mongodb://localhost", maxPoolSize=5)
    initialize_global_factory("mongodb://localhost", maxPoolSize=5, save_on="invocation")
    create_mongodb_session_manager("s", max_inline_attachment_bytes=0).get_message_count("agent").bit_length()
    options: ManagerOptions = {"save_on": "message", "maxPoolSize": 5}
    factory = MongoDBSessionManagerFactory("mongodb://localhost", **options)
    factory.create_session_manager("s", database_name="other", collection_name="other", save_on="invocation")
    factory.list_sessions("a", {"customer": 7}, order="-created_at", limit=5).sessions[0].session_id.upper()
    MongoDBSessionRepository().count_sessions(metadata={"customer": 7}).bit_length()
    factory.erase_owner("ada", progress=lambda progress: print(progress.done))["removed"]["sessions"].bit_length()
    MongoDBSessionRepository().import_session(next(split_export(factory.export_owner("ada"))), owner="ada").upper()


async def valid_async(factory: MongoDBSessionManagerFactory) -> None:
    manager = await factory.create_session_manager_async("s", application_name="a", feedback_hook=blocking_hook)
    await manager.flush()
    async with create_mongodb_session_manager_async("s", "mongodb://localhost", save_on="message") as manager:
        await manager.update_metadata({"a": 1})
    async with factory.create_session_manager_async("s") as manager:
        (await manager.get_message_count("agent")).bit_length()
    async with await factory.create_session_manager_async("s") as manager:
        (await manager.get_usage())["total"]["inputTokens"].bit_length()
    pending: PendingSession = factory.create_session_manager_async("s")
    first, second = await asyncio.gather(pending, factory.create_session_manager_async("t"))
    await (await asyncio.wait_for(factory.create_session_manager_async("u"), 5)).close()
    await (await asyncio.create_task(factory.create_session_manager_async("v"))).close()
    await first.close()


async def invalid(factory: MongoDBSessionManagerFactory) -> None:
    MongoDBSessionManager("s", nonsense=3)  # error: Unexpected keyword argument "nonsense"
    MongoDBSessionManager("s", save_onn="message")  # error: Unexpected keyword argument "save_onn"
    MongoDBSessionManager("s", save_on="messages")  # error: "save_on"
    MongoDBSessionManager("s", maxPoolsSize=5)  # error: Unexpected keyword argument "maxPoolsSize"
    MongoDBSessionManager("s", maxPoolSize="5")  # error: "maxPoolSize"
    MongoDBSessionManager("s", tls="yes")  # error: "tls"
    MongoDBSessionManager("s", session_ttl=5)  # error: "session_ttl"
    MongoDBSessionManager("s", metadata_fields=5)  # error: "metadata_fields"
    MongoDBSessionManager("s", metadata_hook=5)  # error: "metadata_hook"
    MongoDBSessionManager("s", feedbackHook=wrong_hook)  # error: "feedbackHook"
    MongoDBSessionManager("s", client="mongodb://localhost")  # error: "client"
    MongoDBSessionManager(5)  # error: "int"
    MongoDBSessionManager("s", "mongodb://localhost", 5)  # error: "int"
    AsyncMongoDBSessionManager("s", nonsense=3)  # error: Unexpected keyword argument "nonsense"
    AsyncMongoDBSessionManager("s", application_name=b"a")  # error: "application_name"
    MongoDBSessionManagerFactory(nonsense=3)  # error: Unexpected keyword argument "nonsense"
    MongoDBSessionManagerFactory(max_embedded_messages="many")  # error: "max_embedded_messages"
    factory.create_session_manager("s", nonsense=3)  # error: Unexpected keyword argument "nonsense"
    factory.create_session_manager("s", maxPoolSize=3)  # error: Unexpected keyword argument "maxPoolSize"
    factory.create_session_manager("s", save_on="never")  # error: "save_on"
    await factory.create_session_manager_async("s", nonsense=3)  # error: Unexpected keyword argument "nonsense"
    await factory.create_session_manager_async("s", collection_name=5)  # error: "collection_name"
    create_mongodb_session_manager("s", nonsense=3)  # error: Unexpected keyword argument "nonsense"
    await create_mongodb_session_manager_async("s", save_onn=3)  # error: Unexpected keyword argument "save_onn"
    initialize_global_factory(nonsense=3)  # error: Unexpected keyword argument "nonsense"
    initialize_global_factory(save_on=True)  # error: "save_on"
    MongoDBConnectionPool.initialize(nonsense=3)  # error: Unexpected keyword argument "nonsense"
    MongoDBConnectionPool.initialize(save_on="message")  # error: Unexpected keyword argument "save_on"
    factory.list_sessions(nonsense=3)  # error: Unexpected keyword argument "nonsense"
    factory.list_sessions(order="newest")  # error: "order"
    await factory.list_sessions_async(metadata="customer")  # error: "metadata"
    await factory.count_sessions_async(limit=3)  # error: Unexpected keyword argument "limit"
    MongoDBSessionRepository().list_sessions(limit="many")  # error: "limit"
    await factory.erase_owner_async()  # error: Missing positional argument "owner"
    factory.list_sessions().get("s")  # error: has no attribute "get"
    factory.create_session_manager_async("s").flush()  # error: has no attribute "flush"
"""


# Checks the program alone: its errors depend on the signatures of this package and of the driver, not on their bodies.
CONFIG = """
[mypy]
strict = True
follow_imports = skip
[mypy-mongodb_session_manager.*,pymongo.*,bson.*,gridfs.*,motor.*]
follow_imports = silent
ignore_errors = True
[mypy-numpy.*]
follow_imports_for_stubs = True
"""


@pytest.mark.timeout(600)
def test_a_users_program(tmp_path: Path) -> None:
    program, config = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM)
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", f"--config-file={config}", "--cache-dir=/dev/null", program]
    environment = {**os.environ, "MYPYPATH": str(Path(__file__).parents[1] / "src")}
    checked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert checked.stderr == ""
    report = checked.stdout
    found = {int(line): text for line, text in re.findall(r"program\.py:(\d+): error: (.*)", report)}
    expected = {
        number: line.partition("# error: ")[2]
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "# error: " in line
    }
    assert found.keys() == expected.keys(), report
    assert [text for line, text in found.items() if expected[line] not in text] == []
    assert Counter(re.findall(r"program\.py:(\d+): error", report)).most_common(1)[0][1] == 1


def test_the_type_of_client_options_names_every_option_that_the_driver_documents() -> None:
    documented = set(re.findall(r"^ +- `(\w+)`", pymongo.MongoClient.__init__.__doc__ or "", re.MULTILINE))
    assert len(documented) > 40
    assert documented - get_type_hints(package.ClientOptions).keys() == set()
