"""What can go wrong, as one tree.

    MongoDBSessionError                 also Strands' SessionException and StorageError
    ├── ConfigurationError              also ValueError: how the library was set up
    │   ├── ClientTypeError             also TypeError: `client=` is not a MongoDB client
    │   └── AccessDeniedError           also PermissionError: credentials or privileges were refused
    ├── InvalidArgumentError            also ValueError: an argument of a call
    ├── EncodingError                   also ValueError: a value that cannot be stored
    ├── MessageTooLargeError            also ValueError: more than one document can hold
    ├── StateTooLargeError              also ValueError: state, metadata or feedback that does not fit
    ├── SessionNotFoundError            also LookupError
    ├── AgentNotFoundError              also LookupError
    ├── MessageNotFoundError            also LookupError
    ├── SessionExistsError              also ValueError
    ├── SessionConflictError            also RuntimeError: another writer came first, or the session is being copied
    ├── SessionClosedError              also RuntimeError: used before it was opened or after it was closed
    ├── EventLoopError                  also RuntimeError: called where waiting is impossible
    ├── FactoryNotInitializedError      also RuntimeError
    ├── EmbeddedServerError             also RuntimeError: the local mongod for development and tests
    ├── MissingExtraError               also ImportError: a part of the package that was not installed
    ├── NotificationError               also RuntimeError: a notification was given up without being tried to the end
    ├── DatabaseUnavailableError        also ConnectionError: no server, connection lost
    ├── DatabaseTimeoutError            also TimeoutError: the server or the pool was too slow
    └── DatabaseError                   the server refused a command
        └── AttachmentError             bytes of a message are missing, or are not those that were stored

The driver's own error is neither the `__cause__` nor the `__context__`, because it can quote stored data. Three
attributes of every error describe the refusal:

    code        the server's error code, like 13; None if no server refused anything
    code_name   the server's name of the code, like "Unauthorized", or None
    operation   the driver's method that failed, like "update_one", or None

Where it is unknown whether the command was carried out, the message says so and `outcome_unknown` is true; a flush can
be repeated then, and stores everything once. No message and no traceback holds the password of a connection string or
the content of a conversation.
"""

from __future__ import annotations

import copy
from typing import NoReturn, TypeVar

from strands.types.exceptions import SessionException, StorageError


class MongoDBSessionError(SessionException, StorageError):
    """Root of every error this package raises on purpose.

    Attributes:
        code: The error code of the server that refused the command, `None` if no server did.
        code_name: The server's name of that code.
        operation: The driver's method that failed, like `"update_one"`, `None` if the error is not the driver's.
        outcome_unknown: Whether the server may have carried out the command that failed.
    """

    code: int | None = None
    code_name: str | None = None
    operation: str | None = None
    outcome_unknown: bool = False


class ConfigurationError(MongoDBSessionError, ValueError):
    """The connection string, the client or an option cannot be used."""


class ClientTypeError(ConfigurationError, TypeError):
    """`client=` was given something that is not a MongoDB client."""


class AccessDeniedError(ConfigurationError, PermissionError):
    """The server refused the user's credentials, or does not authorize the user.

    Trying again does not help: change the configuration of the client or of the server.
    """


class InvalidArgumentError(MongoDBSessionError, ValueError):
    """An argument was refused before anything was sent."""


class EncodingError(MongoDBSessionError, ValueError):
    """A value has no form that MongoDB can store and that comes back equal."""


class MessageTooLargeError(MongoDBSessionError, ValueError):
    """A message is larger, without its attachments, than can be stored; it was not.

    The conversation goes on without it. Or a write is larger than a MongoDB document may be (16 MiB).
    `StateTooLargeError` is the error for everything else than a message.
    """


class StateTooLargeError(MongoDBSessionError, ValueError):
    """A session's document has no room for the state of an agent or orchestrator, for metadata or for feedback.

    The message names the part that was not stored, and its size. The earlier value stays stored. Everything else is
    stored, including the messages of an agent whose state is too large. The state is stored when it changes to one that
    fits.

    Attributes:
        pending: Whether messages were not stored either, because other parts fill the document. They stay recorded, and
            a flush stores them once there is room.
    """

    pending: bool = False


class SessionNotFoundError(MongoDBSessionError, LookupError):
    """The session does not exist (any more)."""


class AgentNotFoundError(MongoDBSessionError, LookupError):
    """The session has no agent of that id."""


class MessageNotFoundError(MongoDBSessionError, LookupError):
    """The agent has no message of that id."""


class SessionExistsError(MongoDBSessionError, ValueError):
    """A session of that id exists already."""


class SessionConflictError(MongoDBSessionError, RuntimeError):
    """Another writer changed the agent since it was loaded, or the session is being imported or forked.

    Nothing of this write was stored.

    Like HTTP 409: open the session again with a new manager and a new agent, and repeat the request.
    """


class SessionClosedError(MongoDBSessionError, RuntimeError):
    """A manager, factory or repository was used before it was opened or after it was closed."""


class EventLoopError(MongoDBSessionError, RuntimeError):
    """A call would have to wait on the very event loop that must do the work, or that loop does not run."""


class FactoryNotInitializedError(MongoDBSessionError, RuntimeError):
    """The process-wide factory was asked for before it was initialised."""


class EmbeddedServerError(MongoDBSessionError, RuntimeError):
    """The embedded mongod could not be found or started."""


class MissingExtraError(MongoDBSessionError, ImportError):
    """Something needs packages that come with an extra, like `mongodb-session-manager[aws]`."""


class NotificationError(MongoDBSessionError, RuntimeError):
    """A notification was given up: too many wait already, or the process ended first."""


class DatabaseUnavailableError(MongoDBSessionError, ConnectionError):
    """No server could be reached, or the connection was lost and did not come back in time."""


class DatabaseTimeoutError(MongoDBSessionError, TimeoutError):
    """The server, or the wait for a free connection of the pool, took longer than it may."""


class DatabaseError(MongoDBSessionError):
    """The server refused a command."""


class AttachmentError(DatabaseError):
    """An attachment of a message is missing in GridFS, or damaged.

    Attributes:
        references: Internal references to the attachments.
    """

    references: tuple[str, ...] = ()


ErrorT = TypeVar("ErrorT", bound=MongoDBSessionError)


def raise_alone(error: BaseException) -> NoReturn:
    """Raise an error without the error that is being handled, which can hold content.

    `from None` only hides the other error: `__context__` still holds it, and error trackers report it.
    """
    try:
        raise error
    finally:
        error.__cause__ = error.__context__ = None


def again(error: ErrorT, text: str | None = None) -> ErrorT:
    """Return a copy of an error, with its attributes but without its traceback.

    Args:
        error: The error.
        text: Another message.
    """
    copied = copy.copy(error)
    if text is not None:
        copied.args = (text,)
    return copied
