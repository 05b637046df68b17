from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import botocore.loaders
import botocore.session
import certifi
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from arrivals import Queue, Topic, Topics
from endpoint import Endpoint
from mongodb_session_manager._notifications import notify
from mongodb_session_manager.hooks import _aws

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTONLYNOTREAL0",
    "AWS_SECRET_ACCESS_KEY": "not-a-real-secret-key",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@pytest.fixture(scope="session", autouse=True)
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Set them in the environment, with a bundle of one authority: each client loads the whole bundle."""
    one, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    authority = tmp_path_factory.mktemp("aws") / "authority.pem"
    authority.write_text(one + end)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_CA_BUNDLE", str(authority))
        yield CREDENTIALS


@pytest.fixture(scope="session", autouse=True)
def descriptions_are_read_once() -> Iterator[None]:
    """Have all sessions of botocore share what they read of AWS' interfaces."""
    shared = botocore.loaders.create_loader(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", lambda search_path_string=None: shared)
        yield


@pytest.fixture(scope="session")
def moto(credentials: dict[str, str]) -> Iterator[str]:
    """The URL of a server that does what AWS does."""
    from moto.server import ThreadedMotoServer  # half a second, in one of the workers
    from moto.sns.models import Subscription

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subscription, "private_key", lambda _: signing_key())
        yield f"http://{host}:{port}"
    server.stop()


@cache
def signing_key() -> rsa.RSAPrivateKey:
    """Return the key that signs SNS messages: one for all subscriptions, because making one takes 0.1 s."""
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)


@pytest.fixture
def endpoint(moto: str) -> Iterator[Endpoint]:
    """What a test makes of AWS: it hangs, refuses, answers with errors, and else passes requests on to moto."""
    with Endpoint(moto) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def a_dispatcher_of_its_own() -> Iterator[None]:
    """End what a test left behind, so that no other test waits for it, and what another module's test left behind."""
    end_dispatcher()
    yield
    end_dispatcher()


def end_dispatcher() -> None:
    if (dispatcher := notify._dispatcher) is not None:
        notify._dispatcher = None
        dispatcher.portal.call(dispatcher.aclose, 0)
        for client in list(_aws._clients.values()):
            dispatcher.portal.call(client.aclose)


@pytest.fixture(scope="session")
def sqs(moto: str) -> Iterator[Any]:
    """A plain client, to see what arrived."""
    client = boto3.client("sqs", endpoint_url=moto)
    yield client
    client.close()


@pytest.fixture
def queue(sqs: Any) -> Queue:
    return Queue(sqs, uuid.uuid4().hex)


@pytest.fixture
def fifo_queue(sqs: Any) -> Queue:
    return Queue(sqs, f"{uuid.uuid4().hex}.fifo", FifoQueue="true")


@pytest.fixture(scope="session")
def topics(moto: str, sqs: Any) -> Iterator[Topics]:
    client = boto3.client("sns", endpoint_url=moto)
    yield Topics(client, sqs)
    client.close()


@pytest.fixture
def topic(topics: Topics) -> Topic:
    """A topic of which nobody has been notified."""
    return topics.empty("topic")
