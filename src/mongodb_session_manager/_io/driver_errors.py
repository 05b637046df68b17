"""Translation of the driver's errors into the library's, without the content that they can quote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, NamedTuple

from bson.errors import BSONError, InvalidBSON
from pymongo import errors as driver

from ..errors import (
    AccessDeniedError,
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EncodingError,
    EventLoopError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionClosedError,
    again,
    raise_alone,
)

# Server error codes: BSONObjectTooLarge and the two older codes of an update that outgrows 16 MiB.
_TOO_LARGE = {10334, 17419, 17420}
_NO_SUCH_PATH = 28
_DUPLICATE_KEY = 11000

# Server error codes for which PyMongo has its own class only in command errors, not in write concern errors. The first
# set is for a node that steps down, shuts down or recovers, and a router that cannot reach a shard.
_UNAVAILABLE = {6, 7, 91, 133, 134, 189, 9001, 10058, 10107, 11600, 11602, 13435, 13436}
_TIMED_OUT = {50, 64, 89, 202, 262}

# Server error codes of a write that found no room in the server's cache and was not applied: TemporarilyUnavailable and
# TransactionTooLargeForCache.
_CACHE_FULL = {365, 388}

# The driver's modules with public methods, and the operation of those whose methods use a cursor.
_MODULES = {"collection": None, "database": None, "cursor": "find", "command_cursor": "getMore"}


_UNAUTHORIZED = 13
# UserNotFound, AuthenticationFailed, MechanismUnavailable, ReauthenticationRequired.
_NOT_AUTHENTICATED = {11, 18, 334, 391}
_ATLAS = 8000  # "bad auth : ...", among others
# Errors of a TLS handshake that only another configuration can remove.
_TLS_MISMATCH = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|_ALERT_|NO_SHARED_CIPHER|UNSUPPORTED_PROTOCOL"
)


class DuplicateKeyError(DatabaseError):
    """A document with the same value in a unique index already exists. Callers handle it for `_id`."""


class Account(NamedTuple):
    """The user, servers and database of a client, for error messages; none of it is secret."""

    user: str | None = None
    source: str | None = None
    hosts: str = "the server"
    database: str | None = None

    def refused(self, code: int | None) -> AccessDeniedError:
        if code != _UNAUTHORIZED:
            return AccessDeniedError(
                f"MongoDB at {self.hosts} refused to authenticate user {self.user!r} (authSource {self.source!r}, "
                f"code {code}): check user name, password, authSource and authMechanism"
            )
        if self.user is None and self.source is None:
            return AccessDeniedError(
                f"MongoDB at {self.hosts} requires authentication (code {code}): name a user in connection_string "
                "(mongodb://user:password@host), or pass username and password"
            )
        on = "" if self.database is None else f" on the database {self.database!r}"
        return AccessDeniedError(
            f"MongoDB at {self.hosts} does not authorize user {self.user!r}{on} (code {code}): grant the user the role "
            "readWrite there"
        )


# Server error codes for unknown operators (2, 9, 15952), commands (59, 115), expressions (168, 31325), stages (40324)
# and features (303), and for commands and operators outside of the strict Stable API (323).
_UNKNOWN_FEATURE = {2, 9, 59, 115, 168, 303, 323, 15952, 31325, 40324}
_FEATURES = [
    re.compile(rf"(?:^|:: caused by :: ){form}")
    for form in (
        r"(?:[A-Z][a-z ]+ not supported|(?i:unknown|unrecognized|unsupported)[a-z ]+):? '?(\$[A-Za-z]{2,40})\b",
        r"(\$[A-Za-z]{2,40}) is not (?:allowed|supported)\b",
        r"(?:no such c[a-z]+: '|Provided apiStrict:true, but the command )([A-Za-z]{2,40})\b",
    )
]
"""The server's messages that name the unknown feature. Nothing else of a message is shown: it can quote documents."""

UNSUPPORTED = "the server does not support"


def may_be_sent_again(error: Exception) -> bool:
    """Return whether the failed command can be sent again at once, whether or not the server has applied it.

    A timeout is final: it is the limit that the user set, and on a replica set the driver has already sent the command
    twice.
    """
    return (
        isinstance(error, driver.PyMongoError)
        and (
            isinstance(error, driver.AutoReconnect)
            or error.has_error_label("RetryableWriteError")
            or _code(error) in _UNAVAILABLE | _CACHE_FULL
        )
        and not isinstance(error, driver.ServerSelectionTimeoutError | driver.NetworkTimeout)
    )


def may_have_been_applied(error: Exception) -> bool:
    lost = isinstance(error, driver.AutoReconnect) and not isinstance(error, driver.ServerSelectionTimeoutError)
    partly = isinstance(error, driver.BulkWriteError) and bool((error.details or {}).get("writeConcernErrors"))
    return lost or partly or isinstance(error, driver.WriteConcernError) or _code(error) in _UNAVAILABLE


class Attempts:
    """Whether a failed attempt of a command that is sent several times may have been applied."""

    unknown = False


@contextmanager
def driver_errors(*, account: Callable[[], Account] = Account) -> Iterator[Attempts]:
    """Translate the driver's errors. They are not chained, because they can quote user content.

    The message says when it is unknown whether the command was carried out, by this or an earlier attempt. The
    `account` gives the user and the servers for errors about access.
    """
    attempts = Attempts()
    try:
        yield attempts
    except (driver.PyMongoError, BSONError, UnicodeEncodeError, OverflowError) as error:
        translated = translate(error, account)
        if attempts.unknown or may_have_been_applied(error):
            translated = again(translated, f"{translated}; it is unknown whether the command was carried out")
            translated.outcome_unknown = True
        translated.code, translated.code_name = _code(error), _code_name(error)
        translated.operation = _operation(error)
        raise_alone(translated)
    except RuntimeError as error:
        if isinstance(error, MongoDBSessionError) or "after" not in str(error) or "shutdown" not in str(error):
            raise
        raise_alone(EventLoopError("the interpreter is shutting down: no command can be sent to MongoDB"))


def translate(
    error: driver.PyMongoError | BSONError | UnicodeEncodeError | OverflowError,
    account: Callable[[], Account] = Account,
) -> MongoDBSessionError:
    match error:
        case driver.ServerSelectionTimeoutError() if _TLS_MISMATCH.search(_first_line(error)):
            return ConfigurationError(
                f"no TLS connection to the MongoDB server: {_first_line(error)}: check tlsCAFile, "
                "tlsCertificateKeyFile and the host name"
            )
        case driver.ServerSelectionTimeoutError():
            hint = ""
            if "SSL handshake failed" in str(error) or "connection closed" in str(error):
                hint = "; check whether the server and the client options agree on TLS"
            return DatabaseUnavailableError(f"no usable MongoDB server: {_first_line(error)}{hint}")
        case driver.WaitQueueTimeoutError():
            return DatabaseTimeoutError(f"no free connection in the pool: {_first_line(error)}")
        case driver.NetworkTimeout() | driver.ExecutionTimeout() | driver.WTimeoutError():
            return DatabaseTimeoutError(f"MongoDB took too long: {type(error).__name__}")
        case driver.ConnectionFailure():
            return DatabaseUnavailableError(f"the connection to MongoDB was lost: {_first_line(error)}")
        case driver.DocumentTooLarge():
            return MessageTooLargeError("the write is larger than a MongoDB document can be (16 MiB)")
        case driver.ConfigurationError() | driver.InvalidName():
            return ConfigurationError(f"the MongoDB client refused its configuration: {_first_line(error)}")
        case driver.InvalidOperation():
            return SessionClosedError("the MongoDB client is closed")
        case driver.OperationFailure() if _code(error) in _TOO_LARGE:
            return MessageTooLargeError("the session's document would grow beyond 16 MiB")
        case driver.OperationFailure() if _code(error) == _NO_SUCH_PATH:
            return InvalidArgumentError("a key with dots leads through a stored value that is not a document")
        case driver.OperationFailure() if _is_denied(error):
            return account().refused(_code(error))
        case driver.DuplicateKeyError():
            return DuplicateKeyError("a document with the same value of a unique index already exists")
        case driver.OperationFailure() if _code(error) in _UNAVAILABLE:
            return DatabaseUnavailableError(f"MongoDB is not available: {_shown_code(error)}")
        case driver.OperationFailure() if _code(error) in _TIMED_OUT:
            return DatabaseTimeoutError(f"MongoDB took too long: {_shown_code(error)}")
        case driver.OperationFailure() if (refused := refused_feature(error)) is not None:
            return DatabaseError(f"{UNSUPPORTED} {refused} (code {_code(error)})")
        case driver.OperationFailure():
            return DatabaseError(f"MongoDB refused the command: {_shown_code(error)}")
        case InvalidBSON():
            return DatabaseError("cannot decode the reply of MongoDB: invalid BSON")
        case BSONError() | UnicodeEncodeError() | OverflowError():
            return EncodingError("cannot store a value that BSON does not support")
        case _:
            return DatabaseError(f"MongoDB failed: {type(error).__name__}")


def _is_denied(error: driver.OperationFailure) -> bool:
    code = _code(error)
    if code == _ATLAS:
        return "bad auth" in str(error)
    return code == _UNAUTHORIZED or code in _NOT_AUTHENTICATED


def refused_feature(error: driver.OperationFailure) -> str | None:
    """Return the operator, stage or command that the server does not support; `None` for any other error."""
    if error.code not in _UNKNOWN_FEATURE:
        return None
    text = str((error.details or {}).get("errmsg", ""))
    return next((match[1] for form in _FEATURES if (match := form.search(text)) is not None), None)


def _first_line(error: driver.PyMongoError) -> str:
    line = str(error).splitlines()[0].partition(", Topology Description")[0].partition(", full error")[0]
    return re.sub(r" \(configured timeouts: [^)]*\)", "", line)


def _refusal(error: Exception) -> Mapping[str, Any]:
    details: Any = error.details if isinstance(error, driver.OperationFailure | driver.NotPrimaryError) else None
    if not isinstance(details, Mapping):
        return {}
    if isinstance(error, driver.BulkWriteError):
        each = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ())]
        refusal: Mapping[str, Any] = next((one for one in each if one.get("code") != _DUPLICATE_KEY), {})
        return refusal
    return details


def _code(error: Exception) -> int | None:
    code = _refusal(error).get("code", getattr(error, "code", None))
    return code if isinstance(code, int) else None


def _code_name(error: Exception) -> str | None:
    name = _refusal(error).get("codeName")
    return name if isinstance(name, str) else None


def _shown_code(error: Exception) -> str:
    return f"{_code_name(error) or type(error).__name__} (code {_code(error)})"


def _operation(error: BaseException) -> str | None:
    """Return the driver's method that failed: the outermost frame within the driver."""
    for frame, _ in walk_tb(error.__traceback__):
        package, _, module = frame.f_globals.get("__name__", "").rpartition(".")
        if package in ("pymongo.synchronous", "pymongo.asynchronous") and module in _MODULES:
            return _MODULES[module] or frame.f_code.co_name
    return None
