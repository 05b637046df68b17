"""The exception tree.

    MongoDBSessionError                 also Strands' SessionException and StorageError
    ├── ConfigurationError              also ValueError: an invalid connection string, client or option
    │   ├── ClientTypeError             also TypeError: `client=` is not a MongoDB client
    │   └── AccessDeniedError           also PermissionError: the server refused the credentials or a privilege
    ├── InvalidArgumentError            also ValueError: an invalid argument of a call
    ├── EncodingError                   also ValueError: a value that cannot be stored
    ├── MessageTooLargeError            also ValueError: a message that exceeds the size limit of MongoDB
    ├── StateTooLargeError              also ValueError: state, metadata or feedback that exceeds it
    ├── SessionNotFoundError            also LookupError
    ├── AgentNotFoundError              also LookupError
    ├── MessageNotFoundError            also LookupError
    ├── SessionExistsError              also ValueError
    ├── SessionConflictError            also RuntimeError: another writer was first, or the session is being copied
    │   └── SessionBusyError            also TimeoutError: another manager has its turn
    ├── SessionClosedError              also RuntimeError: used before opening or after closing
    ├── EventLoopError                  also RuntimeError: a call that would block its own event loop
    ├── FactoryNotInitializedError      also RuntimeError
    ├── EmbeddedServerError             also RuntimeError: the embedded server
    ├── MissingExtraError               also ImportError: an extra is not installed
    ├── NotificationError               also RuntimeError: a notification was dropped
    ├── DatabaseUnavailableError        also ConnectionError: no server, or a lost connection
    ├── DatabaseTimeoutError            also TimeoutError: a slow server, or an exhausted connection pool
    └── DatabaseError                   the server refused a command
        └── AttachmentError             an attachment is missing or damaged

The driver's error is neither the `__cause__` nor the `__context__`, because it can quote stored data. Three attributes
of every error replace it:

    code        the server's error code, like 13, or None
    code_name   the server's name of the code, like "Unauthorized", or None
    operation   the driver's method that failed, like "update_one", or None

If it is unknown whether the server executed the command, the message says so and `outcome_unknown` is true. Repeating
the flush is safe: it stores everything once. No message or traceback contains the password of a connection string or
the content of a conversation.
"""

from __future__ import annotations

import copy
from typing import NoReturn, TypeVar

from strands.types.exceptions import SessionException, StorageError


class MongoDBSessionError(SessionException, StorageError):
    """The root of the errors of this package.

    Attributes:
        code: The error code of the server, `None` if no server refused a command.
        code_name: The server's name of the code.
        operation: The driver's method that failed, like `"update_one"`, `None` for an error outside the driver.
        outcome_unknown: Whether the server may have executed the command that failed.
    """

    code: int | None = None
    code_name: str | None = None
    operation: str | None = None
    outcome_unknown: bool = False


class ConfigurationError(MongoDBSessionError, ValueError):
    """The connection string, the client or an option is invalid."""


class ClientTypeError(ConfigurationError, TypeError):
    """The value of `client=` is not a MongoDB client."""


class AccessDeniedError(ConfigurationError, PermissionError):
    """The server refused the credentials of the user, or the user lacks a privilege.

    Retrying does not help: change the configuration of the client or of the server.
    """


class InvalidArgumentError(MongoDBSessionError, ValueError):
    """An argument is invalid. Nothing was sent to the server."""


class EncodingError(MongoDBSessionError, ValueError):
    """A value cannot be stored so that it is restored equal."""


class MessageTooLargeError(MongoDBSessionError, ValueError):
    """A message, without its attachments, or a write exceeds the size limit of a MongoDB document (16 MiB).

    The message was not stored, and the conversation continues without it. For anything other than a message, the error
    is `StateTooLargeError`.
    """


class StateTooLargeError(MongoDBSessionError, ValueError):
    """The state of an agent or orchestrator, metadata or feedback exceeds the space left in the session's document.

    The text names the part that was not stored, and its size. The earlier value stays stored. Everything else is
    stored, including the messages of an agent whose state is too large. A later state that fits is stored.

    Attributes:
        pending: Whether messages were not stored either, because other parts fill the document. They stay pending, and
            a flush stores them once there is space.
    """

    pending: bool = False


class SessionNotFoundError(MongoDBSessionError, LookupError):
    """The session does not exist."""


class AgentNotFoundError(MongoDBSessionError, LookupError):
    """The session has no agent with that id."""


class MessageNotFoundError(MongoDBSessionError, LookupError):
    """The agent has no message with that id."""


class SessionExistsError(MongoDBSessionError, ValueError):
    """A session with that id already exists."""


class SessionConflictError(MongoDBSessionError, RuntimeError):
    """Another writer changed the agent after it was loaded, or the session is being imported or forked.

    The write was not stored. Open the session again with a new manager and a new agent, or call `reload()` of the
    manager, and repeat the request. The corresponding HTTP status is 409.
    """


class SessionBusyError(SessionConflictError, TimeoutError):
    """Another manager has its turn in the session: with `on_busy="refuse"`, or for longer than `busy_timeout`.

    Nothing was stored. If the session was being opened, or the turn had not begun, nothing was sent to a model. Repeat
    the request later. The corresponding HTTP status is 409.
    """


class SessionClosedError(MongoDBSessionError, RuntimeError):
    """A manager, factory or repository was used before it was opened or after it was closed."""


class EventLoopError(MongoDBSessionError, RuntimeError):
    """A call would block the event loop that does its work, or that loop does not run."""


class FactoryNotInitializedError(MongoDBSessionError, RuntimeError):
    """The process-wide factory was used before it was initialized."""


class EmbeddedServerError(MongoDBSessionError, RuntimeError):
    """The embedded server was not found, did not start, or has exited."""


class MissingExtraError(MongoDBSessionError, ImportError):
    """A feature needs an extra that is not installed, like `mongodb-session-manager[aws]`."""


class NotificationError(MongoDBSessionError, RuntimeError):
    """A notification was dropped: the queue is full, or the process exited before the delivery."""


class DatabaseUnavailableError(MongoDBSessionError, ConnectionError):
    """No server was reachable, or the connection was lost and not restored in time."""


class DatabaseTimeoutError(MongoDBSessionError, TimeoutError):
    """The server, or the wait for a free connection of the pool, exceeded its time limit."""


class DatabaseError(MongoDBSessionError):
    """The server refused a command."""


class AttachmentError(DatabaseError):
    """An attachment of a message is missing or damaged.

    Attributes:
        references: Internal references to the attachments.
    """

    references: tuple[str, ...] = ()


ErrorT = TypeVar("ErrorT", bound=MongoDBSessionError)


def raise_alone(error: BaseException) -> NoReturn:
    """Raise an error without the error that is being handled, which can contain content.

    `from None` only hides the handled error: it stays in `__context__`, and error trackers report it.
    """
    try:
        raise error
    finally:
        error.__cause__ = error.__context__ = None


def again(error: ErrorT, text: str | None = None) -> ErrorT:
    """Return a copy of an error, with its attributes but without its traceback.

    Args:
        error: The error.
        text: The message of the copy; default the same.
    """
    copied = copy.copy(error)
    if text is not None:
        copied.args = (text,)
    return copied
