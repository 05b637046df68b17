"""Servers of MongoDB that require authentication or TLS."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pymongo.errors import PyMongoError

from mongodb_session_manager.embedded import find_mongod

ADMIN, PASSWORD = "root", "hunter2secret"


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def mongod(*arguments: str, **client_options: Any) -> Iterator[str]:
    """Run a standalone mongod with the arguments and yield its host and port."""
    with tempfile.TemporaryDirectory() as directory:
        port = unused_port()
        command = [str(find_mongod()), "--port", str(port), "--dbpath", directory, "--bind_ip", "127.0.0.1", "--quiet"]
        command += ["--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--logpath", str(Path(directory) / "log")]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            options = {"serverSelectionTimeoutMS": 500, **client_options}
            with pymongo.MongoClient[dict[str, Any]](f"127.0.0.1:{port}", directConnection=True, **options) as client:
                while True:
                    try:
                        client.admin.command("ping")
                        break
                    except PyMongoError:
                        assert process.poll() is None, (Path(directory) / "log").read_text()
                        assert time.monotonic() < end, "mongod does not answer"
                        time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@contextmanager
def with_users() -> Iterator[str]:
    """Run a mongod and yield host and port; its users are root, reader and writer (of everything), and stranger."""
    with mongod("--auth", "--setParameter", "enableTestCommands=1") as host:
        with pymongo.MongoClient[dict[str, Any]](host, directConnection=True) as client:
            client.admin.command("createUser", ADMIN, pwd=PASSWORD, roles=["root"])
        with pymongo.MongoClient[dict[str, Any]](
            host, username=ADMIN, password=PASSWORD, directConnection=True
        ) as client:
            client.admin.command("createUser", "reader", pwd=PASSWORD, roles=["readAnyDatabase"])
            client.admin.command("createUser", "writer", pwd=PASSWORD, roles=["readWriteAnyDatabase"])
            client.admin.command("createUser", "stranger", pwd=PASSWORD, roles=[])
        yield host


def certificates(directory: Path, *, name: str = "localhost") -> Path:
    """Write an authority (`ca.pem`) and a key with a certificate for `name` by it (`key.pem`); return the directory."""
    now = datetime.now(UTC)

    def signed(subject: str, public: Any, issuer: str, key: Any, *, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        return builder.sign(key, hashes.SHA256())

    directory.mkdir(parents=True, exist_ok=True)
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))  # RSA keys take a second
    pem = serialization.Encoding.PEM
    root = signed("authority", authority.public_key(), "authority", authority, authority=True)
    certificate = signed(name, key.public_key(), "authority", authority, authority=False)
    (directory / "ca.pem").write_bytes(root.public_bytes(pem))
    secret = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(secret + certificate.public_bytes(pem))
    return directory
