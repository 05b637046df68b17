"""Keep Strands agents' conversations and state in MongoDB.

Asynchronous code opens a session with `create_mongodb_session_manager_async` or a factory's
`create_session_manager_async`, synchronous code with `MongoDBSessionManager`, and both pass it to
`strands.Agent(session_manager=...)`.
"""

from __future__ import annotations

from ._async_manager import AsyncMongoDBSessionManager
from ._capture import GUARDRAIL_STOP_REASONS
from ._factory import (
    MongoDBSessionManagerFactory,
    close_global_factory,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    get_global_factory,
    initialize_global_factory,
)
from ._finding import SessionPage, SessionSummary
from ._manager import MongoDBSessionManager
from ._pool import MongoDBConnectionPool
from ._repository import AsyncMongoDBSessionRepository
from ._storage import MongoDBStorage
from ._sync import MongoDBSessionRepository
from .errors import (
    AgentNotFoundError,
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
    MongoDBSessionError,
    SessionClosedError,
    SessionConflictError,
    SessionExistsError,
    SessionNotFoundError,
)

__all__ = [
    "GUARDRAIL_STOP_REASONS",
    "AgentNotFoundError",
    "AsyncMongoDBSessionManager",
    "AsyncMongoDBSessionRepository",
    "ClientTypeError",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseTimeoutError",
    "DatabaseUnavailableError",
    "EmbeddedServerError",
    "EncodingError",
    "EventLoopError",
    "FactoryNotInitializedError",
    "InvalidArgumentError",
    "MessageNotFoundError",
    "MessageTooLargeError",
    "MongoDBConnectionPool",
    "MongoDBSessionError",
    "MongoDBSessionManager",
    "MongoDBSessionManagerFactory",
    "MongoDBSessionRepository",
    "MongoDBStorage",
    "SessionClosedError",
    "SessionConflictError",
    "SessionExistsError",
    "SessionNotFoundError",
    "SessionPage",
    "SessionSummary",
    "close_global_factory",
    "create_mongodb_session_manager",
    "create_mongodb_session_manager_async",
    "get_global_factory",
    "initialize_global_factory",
]
