"""Keep Strands agents' conversations and state in MongoDB.

Asynchronous code opens a session with `create_mongodb_session_manager_async` or a factory's
`create_session_manager_async`, synchronous code with `MongoDBSessionManager`, and both pass it to
`strands.Agent(session_manager=...)`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import typing

from ._io.options import ClientOptions, ContentOptions, RepositoryOptions
from ._managers.async_manager import AsyncMongoDBSessionManager
from ._managers.capture import GUARDRAIL_ACTION_BLOCKED, GUARDRAIL_STOP_REASONS
from ._managers.factory import (
    MongoDBSessionManagerFactory,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
)
from ._managers.global_factory import close_global_factory, get_global_factory, initialize_global_factory
from ._managers.options import ManagerOptions, OnBusy, SaveOn, SessionOptions
from ._managers.pending import PendingSession
from ._managers.pool import ConnectionStats, MongoDBConnectionPool
from ._managers.sync_manager import MongoDBSessionManager
from ._managers.user_hooks import Hook, chain_hooks
from ._notifications.notification import NotificationEvent, OnError
from ._notifications.notify import NotificationStats, RetryOn, notify_later
from ._repository.async_repository import AsyncMongoDBSessionRepository
from ._repository.copying import split_export
from ._repository.listing import Order, SessionPage, SessionSummary
from ._repository.metadata import AgentConfig, UsageReport
from ._repository.sync_repository import MongoDBSessionRepository
from ._storage.storage import MongoDBStorage
from ._store.erasure import ErasureCheck, ErasureProgress, ErasureReceipt
from .errors import (
    AccessDeniedError,
    AgentNotFoundError,
    AttachmentError,
    ClientTypeError,
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EmbeddedServerError,
    EncodingError,
    EventLoopError,
    FactoryNotInitializedError,
    InvalidArgumentError,
    MessageNotFoundError,
    MessageTooLargeError,
    MissingExtraError,
    MongoDBSessionError,
    NotificationError,
    SessionBusyError,
    SessionClosedError,
    SessionConflictError,
    SessionExistsError,
    SessionNotFoundError,
    StateTooLargeError,
)
from .hooks import _ORIGINS, _has_extra

if typing.TYPE_CHECKING:
    from ._io.drivers import Client
    from .hooks.sns import FeedbackSNSHook, create_feedback_sns_hook
    from .hooks.sqs import MetadataSQSHook, create_metadata_sqs_hook
    from .hooks.websocket import MetadataWebSocketHook, create_metadata_websocket_hook

__all__ = [
    "GUARDRAIL_ACTION_BLOCKED",
    "GUARDRAIL_STOP_REASONS",
    "AccessDeniedError",
    "AgentConfig",
    "AgentNotFoundError",
    "AsyncMongoDBSessionManager",
    "AsyncMongoDBSessionRepository",
    "AttachmentError",
    "Client",
    "ClientOptions",
    "ClientTypeError",
    "ConfigurationError",
    "ConnectionStats",
    "ContentOptions",
    "DatabaseError",
    "DatabaseTimeoutError",
    "DatabaseUnavailableError",
    "EmbeddedServerError",
    "EncodingError",
    "ErasureCheck",
    "ErasureProgress",
    "ErasureReceipt",
    "EventLoopError",
    "FactoryNotInitializedError",
    "FeedbackSNSHook",
    "Hook",
    "InvalidArgumentError",
    "ManagerOptions",
    "MessageNotFoundError",
    "MessageTooLargeError",
    "MetadataSQSHook",
    "MetadataWebSocketHook",
    "MissingExtraError",
    "MongoDBConnectionPool",
    "MongoDBSessionError",
    "MongoDBSessionManager",
    "MongoDBSessionManagerFactory",
    "MongoDBSessionRepository",
    "MongoDBStorage",
    "NotificationError",
    "NotificationEvent",
    "NotificationStats",
    "OnBusy",
    "OnError",
    "Order",
    "PendingSession",
    "RepositoryOptions",
    "RetryOn",
    "SaveOn",
    "SessionBusyError",
    "SessionClosedError",
    "SessionConflictError",
    "SessionExistsError",
    "SessionNotFoundError",
    "SessionOptions",
    "SessionPage",
    "SessionSummary",
    "StateTooLargeError",
    "UsageReport",
    "chain_hooks",
    "close_global_factory",
    "create_feedback_sns_hook",
    "create_metadata_sqs_hook",
    "create_metadata_websocket_hook",
    "create_mongodb_session_manager",
    "create_mongodb_session_manager_async",
    "get_global_factory",
    "initialize_global_factory",
    "is_feedback_sns_hook_available",
    "is_metadata_sqs_hook_available",
    "is_metadata_websocket_hook_available",
    "notify_later",
    "split_export",
]

_WITH_AWS = {name: module for module, name in _ORIGINS.values()}
_LATER = {"Client", *_WITH_AWS}


if not _has_extra():  # `from mongodb_session_manager import *` imports the names of the installed extras
    __all__ = [name for name in __all__ if name not in _WITH_AWS]


def __getattr__(name: str) -> typing.Any:
    """Import an AWS hook, which needs the extra `aws`, or Motor, or look up the version on first access."""
    if name == "__version__":
        try:
            return importlib.metadata.version("mongodb-session-manager")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError("mongodb-session-manager is not installed, so its version is unknown") from None
    if name in _WITH_AWS:
        return getattr(importlib.import_module(f".hooks.{_WITH_AWS[name]}", __name__), name)
    if name == "Client":
        from ._io import drivers  # the type of all clients needs Motor

        return drivers.Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})


def _is_importable(module: str) -> bool:
    try:
        importlib.import_module(f".hooks.{module}", __name__)
    except ImportError:
        return False
    return True


def is_feedback_sns_hook_available() -> bool:
    """Return whether the extra `aws` is installed, which the SNS hook needs."""
    return _is_importable("sns")


def is_metadata_sqs_hook_available() -> bool:
    """Return whether the extra `aws` is installed, which the SQS hook needs."""
    return _is_importable("sqs")


def is_metadata_websocket_hook_available() -> bool:
    """Return whether the extra `aws` is installed, which the WebSocket hook needs."""
    return _is_importable("websocket")
