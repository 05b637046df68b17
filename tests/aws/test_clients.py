"""Clients: one for all hooks with the same options, open from the first call until the hooks are collected."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aioboto3
import aiohttp
import pytest
from botocore.config import Config

import interpreter
import mongodb_session_manager
from arrivals import Queue
from endpoint import Endpoint
from mongodb_session_manager import MongoDBSessionManagerFactory, create_metadata_sqs_hook
from mongodb_session_manager._io.loop import io_portal
from mongodb_session_manager.hooks import _aws
from support import eventually

PACKAGE = Path(mongodb_session_manager.__file__).parent


def open_clients(url: str | None = None) -> int:
    """Return how many clients are open, at one address, which a hook of another test cannot share, or at all."""
    return sum(client.is_open for client in _aws._clients.values() if url in (None, client.key.endpoint_url))


def test_hooks_share_a_client_and_the_last_one_collected_closes_it(
    endpoint: Endpoint, queue: Queue, server: str, database: str
) -> None:
    first = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)
    second = create_metadata_sqs_hook(queue.url, ["status"], endpoint_url=endpoint.url)
    with MongoDBSessionManagerFactory(server, database) as factory:
        assert open_clients(endpoint.url) == 0
        with factory.create_session_manager("s", metadata_hook=first) as manager:
            manager.update_metadata({"n": 1})
        eventually(lambda: factory.get_notification_stats()["waiting"] == 0)
        assert open_clients(endpoint.url) == 1
        with factory.create_session_manager("s", metadata_hook=second) as manager:
            manager.update_metadata({"status": 1})
        assert open_clients(endpoint.url) == 1
    assert open_clients(endpoint.url) == 1
    del first, second, manager
    gc.collect()
    eventually(lambda: open_clients(endpoint.url) == 0)
    assert len(queue.arrived()) == 2


def test_one_per_endpoint_session_and_region(factory: Any, moto: str, endpoint: Endpoint, queue: Queue) -> None:
    session = aioboto3.Session()
    wheres: list[dict[str, Any]] = [
        {"endpoint_url": moto},
        {"endpoint_url": moto},
        {"endpoint_url": endpoint.url},
        {"endpoint_url": moto, "aws_session": session},
        {"endpoint_url": moto, "aws_session": session},
        {"endpoint_url": moto, "region_name": "us-east-1"},
        {"endpoint_url": moto, "config": Config(user_agent_extra="mine")},
    ]
    managers = []
    for number, where in enumerate(wheres):
        hook = create_metadata_sqs_hook(queue.url, **where)
        managers.append(factory.create_session_manager(f"s {number}", metadata_hook=hook))
        managers[-1].update_metadata({"n": number})
    eventually(lambda: factory.get_notification_stats()["waiting"] == 0)
    assert open_clients() == 5


def test_connections_are_reused(factory: Any, endpoint: Endpoint, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        for number in range(5):
            manager.update_metadata({"n": number})
    assert (len(endpoint.requests), endpoint.connections) == (5, 1)


class Credentials(BaseHTTPRequestHandler):
    """Gives out credentials like the agent of a container service, when it may."""

    may_answer: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.may_answer.wait(30)
        given = {"AccessKeyId": "AKIATEST", "SecretAccessKey": "s", "Token": "t", "Expiration": "2100-01-01T00:00:00Z"}
        content = json.dumps(given).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def test_a_client_whose_opening_was_given_up_is_used_by_the_next(
    factory: Any, moto: str, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Handler", (Credentials,), {"may_answer": threading.Event(), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/credentials")
        client = _aws.shared_client(
            "sqs", region_name=None, endpoint_url=moto, aws_session=aioboto3.Session(), config=None
        )

        tasks: list[asyncio.Task[Any] | None] = []

        async def send(client: _aws.AwsClient, text: str) -> None:
            tasks.append(asyncio.current_task())
            await client.call("send_message", QueueUrl=queue.url, MessageBody=text)

        io_portal().submit(send, client, "cancelled")
        eventually(lambda: handler.asked)
        io_portal().loop.call_soon_threadsafe(tasks[0].cancel)
        handler.may_answer.set()
        io_portal().call(send, client, "sent")
        assert handler.asked == ["/credentials"]
        assert open_clients() == 1
        del client
        tasks.clear()
        gc.collect()
        eventually(lambda: open_clients() == 0)
        server.shutdown()
        serving.join()
    assert [message.body for message in queue.arrived()] == ["sent"]


def test_a_hook_within_another_keeps_its_client_until_it_is_collected(
    factory: Any, endpoint: Endpoint, queue: Queue
) -> None:
    sqs = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)

    def wrapped(hook: Any) -> Any:
        async def own(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
            return await hook(original_func, action, session_id, **argument)

        return own

    with factory.create_session_manager("s", metadata_hook=wrapped(sqs)) as manager:
        manager.update_metadata({"n": 1})
    assert open_clients(endpoint.url) == 1
    del sqs, manager
    gc.collect()
    eventually(lambda: open_clients(endpoint.url) == 0)


def test_a_client_closes_however_often_a_call_is_cancelled(
    endpoint: Endpoint, some: Callable[[range, int], list[int]]
) -> None:
    endpoint.hangs()
    where = {"region_name": "eu-west-1", "endpoint_url": endpoint.url, "aws_session": None, "config": None}

    async def cancel_twice(steps: int) -> None:
        client = _aws.shared_client("sqs", **where)
        asked = len(endpoint.requests)
        calling = asyncio.create_task(client.call("list_queues"))
        await asyncio.to_thread(eventually, lambda: len(endpoint.requests) > asked)
        calling.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait([calling])
        await client.aclose()

    for steps in some(range(8), 3):
        io_portal().call(cancel_twice, steps)
        sessions = [each for each in gc.get_objects() if type(each) is aiohttp.ClientSession]
        assert [each for each in sessions if not each.closed] == []


@pytest.mark.own_factory
def test_a_config_of_the_callers_own_is_used(factory: Any, endpoint: Endpoint, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(
        queue.url, endpoint_url=endpoint.url, config=Config(retries={"total_max_attempts": 3})
    )
    endpoint.answers(500, 500, "pass")
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"n": 1})
    stats = factory.get_notification_stats()
    assert (len(endpoint.requests), stats["retried"], stats["delivered"]) == (3, 0, 1)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_one_module_knows_aws() -> None:
    aws = {"aioboto3", "aiobotocore", "aiohttp", "boto3", "botocore"}
    mentioning = [path for path in PACKAGE.rglob("*.py") if any(name in path.read_text() for name in aws)]
    assert {path.name: names for path in mentioning if (names := imported(path) & aws)} == {
        "_aws.py": {"aioboto3", "aiobotocore", "botocore"}
    }


def test_messages_know_neither_a_loop_nor_a_driver() -> None:
    assert not imported(PACKAGE / "hooks" / "_messages.py") & {"asyncio", "anyio", "pymongo", "motor", "aioboto3"}


def test_hooks_that_send_nothing_start_no_thread() -> None:
    program = (
        "import gc, threading\n"
        "from mongodb_session_manager import create_metadata_sqs_hook as create\n"
        "hooks = [create('https://sqs.eu-west-1.amazonaws.com/1/q') for _ in range(2)]\n"
        "del hooks\n"
        "gc.collect()\n"
        "print(threading.active_count())\n"
    )
    assert interpreter.run(program)[0] == "1\n"
