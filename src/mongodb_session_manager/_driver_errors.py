"""The driver's errors as ours, without anything that a document holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pymongo import errors as driver

from .errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EventLoopError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionClosedError,
)

# Server error codes: BSONObjectTooLarge and the two older codes of an update that outgrows 16 MiB.
_TOO_LARGE = {10334, 17419, 17420}
_NO_SUCH_PATH = 28

# Server error codes of what a server does not know: operators (2, 9, 15952), commands (59, 115), expressions (168,
# 31325), stages (40324), features (303), and what is not in the strict Stable API (323).
_UNKNOWN_FEATURE = {2, 9, 59, 115, 168, 303, 323, 15952, 31325, 40324}
_FEATURES = [
    re.compile(rf"(?:^|:: caused by :: ){form}")
    for form in (
        r"(?:[A-Z][a-z ]+ not supported|(?i:unknown|unrecognized|unsupported)[a-z ]+):? '?(\$[A-Za-z]{2,40})\b",
        r"(\$[A-Za-z]{2,40}) is not (?:allowed|supported)\b",
        r"(?:no such c[a-z]+: '|Provided apiStrict:true, but the command )([A-Za-z]{2,40})\b",
    )
]
"""The texts of the server that name it. A text can quote documents, so no other part of one is ever shown."""

UNSUPPORTED = "the server does not support"


def may_be_sent_again(error: Exception) -> bool:
    """Tell whether the command that failed may be sent again at once; it may or may not have been applied.

    An error that has waited as long as the user allows is final; on a replica set the driver has sent the command a
    second time by then.
    """
    return (
        isinstance(error, driver.PyMongoError)
        and (isinstance(error, driver.AutoReconnect) or error.has_error_label("RetryableWriteError"))
        and not isinstance(error, driver.ServerSelectionTimeoutError | driver.NetworkTimeout)
    )


def may_have_been_applied(error: Exception) -> bool:
    """Tell whether the server may have carried out the command that failed."""
    lost = isinstance(error, driver.AutoReconnect) and not isinstance(error, driver.ServerSelectionTimeoutError)
    return lost or isinstance(error, driver.WriteConcernError)


def code_of(error: BaseException | None) -> int | None:
    """Return the server's error code of an error of ours or the driver's, `None` if the server has sent none."""
    code = getattr(error, "code", None) or getattr(getattr(error, "__cause__", None), "code", None)
    return code if isinstance(code, int) else None


@dataclass
class Attempts:
    """What is known of a command that is sent several times.

    Attributes:
        unknown: Whether one of them may have been carried out though it failed.
    """

    unknown: bool = False


@contextmanager
def driver_errors(*, passing: type[driver.PyMongoError] | tuple[()] = ()) -> Iterator[Attempts]:
    """Raise the driver's errors as ours, but for `passing`, which the caller expects.

    The error says so if it is unknown whether the command was carried out, by this or an earlier attempt.

    Raises:
        MongoDBSessionError: The subclass that fits, the driver's error as its cause.
    """
    attempts = Attempts()
    try:
        yield attempts
    except passing:
        raise
    except (driver.PyMongoError, driver.DocumentTooLarge) as error:
        translated = translate(error)
        if attempts.unknown or may_have_been_applied(error):
            translated = type(translated)(f"{translated}; it is unknown whether the command was carried out")
        raise translated from error
    except RuntimeError as error:
        if isinstance(error, MongoDBSessionError) or "after" not in str(error) or "shutdown" not in str(error):
            raise
        raise EventLoopError("the interpreter is shutting down: nothing can be sent to MongoDB any more") from error


def translate(error: driver.PyMongoError | driver.DocumentTooLarge) -> MongoDBSessionError:
    """Return the error of this package that says the same, without anything that a document holds."""
    match error:
        case driver.ServerSelectionTimeoutError():
            return DatabaseUnavailableError(f"no usable MongoDB server: {_first_line(error)}")
        case driver.WaitQueueTimeoutError():
            return DatabaseTimeoutError(f"no free connection in the pool: {_first_line(error)}")
        case driver.NetworkTimeout() | driver.ExecutionTimeout() | driver.WTimeoutError():
            return DatabaseTimeoutError(f"MongoDB took too long: {type(error).__name__}")
        case driver.ConnectionFailure():
            return DatabaseUnavailableError(f"the connection to MongoDB was lost: {_first_line(error)}")
        case driver.DocumentTooLarge():
            return MessageTooLargeError("the write is larger than a MongoDB document may be (16 MiB)")
        case driver.ConfigurationError() | driver.InvalidName():
            return ConfigurationError(f"the MongoDB client refused its configuration: {_first_line(error)}")
        case driver.InvalidOperation():
            return SessionClosedError("the MongoDB client is closed")
        case driver.OperationFailure() if error.code in _TOO_LARGE:
            return MessageTooLargeError("the session's document would grow beyond 16 MiB")
        case driver.OperationFailure() if error.code == _NO_SUCH_PATH:
            return InvalidArgumentError("a key with dots leads through a stored value that holds no keys")
        case driver.OperationFailure() if (refused := refused_feature(error)) is not None:
            return DatabaseError(f"{UNSUPPORTED} {refused} (code {error.code})")
        case driver.OperationFailure():
            name = (error.details or {}).get("codeName", type(error).__name__)
            return DatabaseError(f"MongoDB refused the command: {name} (code {error.code})")
        case _:
            return DatabaseError(f"MongoDB failed: {type(error).__name__}")


def refused_feature(error: driver.OperationFailure) -> str | None:
    """Return the operator, stage or command that a server does not know, `None` if it refused for another reason."""
    if error.code not in _UNKNOWN_FEATURE:
        return None
    text = str((error.details or {}).get("errmsg", ""))
    return next((match[1] for form in _FEATURES if (match := form.search(text)) is not None), None)


def _first_line(error: driver.PyMongoError) -> str:
    return str(error).splitlines()[0].partition(", Topology Description")[0].partition(", full error")[0]
