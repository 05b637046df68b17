"""The types of the options of clients and repositories, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import timedelta, tzinfo
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from bson.codec_options import DatetimeConversion, TypeRegistry
from pymongo.driver_info import DriverInfo
from pymongo.monitoring import (
    CommandListener,
    ConnectionPoolListener,
    ServerHeartbeatListener,
    ServerListener,
    TopologyListener,
)
from pymongo.read_preferences import Nearest, Primary, PrimaryPreferred, Secondary, SecondaryPreferred
from pymongo.server_api import ServerApi
from pymongo.server_description import ServerDescription

from . import drivers

if TYPE_CHECKING:
    from pymongo.encryption_options import AutoEncryptionOpts
else:  # its module is not imported to name a type, but annotations can be evaluated
    AutoEncryptionOpts = Any

_Listener: TypeAlias = (
    CommandListener | ConnectionPoolListener | ServerHeartbeatListener | ServerListener | TopologyListener
)
_ReadPreference: TypeAlias = Primary | PrimaryPreferred | Secondary | SecondaryPreferred | Nearest
_ServerSelector: TypeAlias = Callable[[list[ServerDescription]], list[ServerDescription]]


class ClientOptions(TypedDict, total=False):
    """Options of PyMongo's `MongoClient`, as it documents them; `None` is the same as leaving an option out."""

    # Connections.
    maxPoolSize: int | None
    minPoolSize: int | None
    maxConnecting: int | None
    maxIdleTimeMS: float | None
    waitQueueTimeoutMS: float | None
    connectTimeoutMS: float | None
    socketTimeoutMS: float | None
    timeoutMS: float | None
    compressors: str | Sequence[str] | None
    zlibCompressionLevel: int | None
    connect: bool | None

    # Servers.
    directConnection: bool | None
    loadBalanced: bool | None
    replicaSet: str | None
    serverSelectionTimeoutMS: float | None
    localThresholdMS: float | None
    server_selector: _ServerSelector | None
    heartbeatFrequencyMS: float | None
    serverMonitoringMode: Literal["auto", "stream", "poll"] | None
    srvServiceName: str | None
    srvMaxHosts: int | None
    srvAllowedHostsSuffix: str | None
    srv_host_validator: Callable[[str], bool] | None
    server_api: ServerApi | None

    # Reads and writes.
    retryReads: bool | None
    retryWrites: bool | None
    max_adaptive_retries: int | None
    enable_overload_retargeting: bool | None
    readPreference: str | None
    read_preference: _ReadPreference | None
    readPreferenceTags: str | Sequence[Mapping[str, str]] | None
    maxStalenessSeconds: int | None
    readConcernLevel: str | None
    w: int | str | None
    wTimeoutMS: float | None
    journal: bool | None
    fsync: bool | None

    # Authentication.
    username: str | None
    password: str | None
    authSource: str | None
    authMechanism: str | None
    authMechanismProperties: str | Mapping[str, object] | None
    authOIDCAllowedHosts: Sequence[str] | None

    # TLS and encryption.
    tls: bool | None
    ssl: bool | None
    tlsInsecure: bool | None
    tlsAllowInvalidCertificates: bool | None
    tlsAllowInvalidHostnames: bool | None
    tlsCAFile: str | None
    tlsCertificateKeyFile: str | None
    tlsCertificateKeyFilePassword: str | None
    tlsCRLFile: str | None
    tlsDisableOCSPEndpointCheck: bool | None
    auto_encryption_opts: AutoEncryptionOpts | None

    # Options that the server and the application see.
    appname: str | None
    appName: str | None
    driver: DriverInfo | None
    event_listeners: Sequence[_Listener] | None
    document_class: type[MutableMapping[str, Any]] | None
    tz_aware: bool | None
    tzinfo: tzinfo | None
    type_registry: TypeRegistry | None
    datetime_conversion: DatetimeConversion | str | int | None
    uuidRepresentation: str | None
    unicode_decode_error_handler: str | None


class ContentOptions(TypedDict, total=False):
    """How sessions are stored.

    Attributes:
        application_name: Stored in sessions that are created; it never changes afterwards.
        owner: The owner of the sessions, at most 1,024 bytes: stored in sessions that are created, and never changed. A
            manager, factory or repository with an owner treats sessions of other owners, and of none, as if they did
            not exist. With `None`, it can use all sessions.
        metadata_fields: The fields of `metadata` to index, with one index each.
        max_inline_attachment_bytes: Images, documents and videos of a message that together are larger are stored in
            GridFS, in the bucket `<collection_name>_attachments`. Default 256 KiB.
        max_embedded_messages: The maximum number of messages of an agent in the session's document; older ones are
            archived. Default 128.
        max_embedded_bytes: The maximum number of bytes of an agent's messages in the session's document. Default
            256 KiB.
        session_ttl: A session expires, with archive and attachments, if it is not written to for this time. Each
            session has its own value; another value applies from the next write. With `None`, an expiring session
            keeps its value, and any other session does not expire.
    """

    application_name: str | None
    owner: str | None
    metadata_fields: Sequence[str] | None
    max_inline_attachment_bytes: int | None
    max_embedded_messages: int | None
    max_embedded_bytes: int | None
    session_ttl: timedelta | None


class RepositoryOptions(ContentOptions, ClientOptions, total=False):
    """The options of a repository: those of `ContentOptions`, those of PyMongo's client, and the client itself.

    Attributes:
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
            It replaces the connection string and the client options.
    """

    client: drivers.Client | None
