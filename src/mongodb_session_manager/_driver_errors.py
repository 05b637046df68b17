"""The driver's errors as ours, without anything that a document holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pymongo import errors as driver

from .errors import (
    AccessDeniedError,
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

_UNAUTHORIZED = 13
# UserNotFound, AuthenticationFailed, MechanismUnavailable, ReauthenticationRequired.
_NOT_AUTHENTICATED = {11, 18, 334, 391}
_ATLAS = 8000  # "bad auth : ...", among others
# What a TLS handshake fails with as long as the configuration stays as it is.
_TLS_MISMATCH = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|_ALERT_|NO_SHARED_CIPHER|UNSUPPORTED_PROTOCOL"
)


@dataclass(frozen=True)
class Account:
    """Who a client is at which servers, as far as an error may show it."""

    user: str | None = None
    source: str | None = None
    hosts: str = "the server"
    database: str | None = None

    def refused(self, code: int | None) -> AccessDeniedError:
        """Return the error for a refused authentication or authorization."""
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


@dataclass
class Attempts:
    """What is known of a command that is sent several times.

    Attributes:
        unknown: Whether one of them may have been carried out though it failed.
    """

    unknown: bool = False


@contextmanager
def driver_errors(
    *, passing: type[driver.PyMongoError] | tuple[()] = (), account: Callable[[], Account] = Account
) -> Iterator[Attempts]:
    """Raise the driver's errors as ours, but for `passing`, which the caller expects.

    The error says so if it is unknown whether the command was carried out, by this or an earlier attempt. `account`
    says who was refused.

    Raises:
        MongoDBSessionError: The subclass that fits, the driver's error as its cause.
    """
    attempts = Attempts()
    try:
        yield attempts
    except passing:
        raise
    except (driver.PyMongoError, driver.DocumentTooLarge) as error:
        translated = translate(error, account)
        if isinstance(translated, AccessDeniedError):
            raise translated from None
        if attempts.unknown or may_have_been_applied(error):
            translated = type(translated)(f"{translated}; it is unknown whether the command was carried out")
        raise translated from error
    except RuntimeError as error:
        if isinstance(error, MongoDBSessionError) or "after" not in str(error) or "shutdown" not in str(error):
            raise
        raise EventLoopError("the interpreter is shutting down: nothing can be sent to MongoDB any more") from error


def translate(
    error: driver.PyMongoError | driver.DocumentTooLarge, account: Callable[[], Account] = Account
) -> MongoDBSessionError:
    """Return the error of this package that says the same, without anything that a document holds."""
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
            return MessageTooLargeError("the write is larger than a MongoDB document may be (16 MiB)")
        case driver.ConfigurationError() | driver.InvalidName():
            return ConfigurationError(f"the MongoDB client refused its configuration: {_first_line(error)}")
        case driver.InvalidOperation():
            return SessionClosedError("the MongoDB client is closed")
        case driver.OperationFailure() if error.code in _TOO_LARGE:
            return MessageTooLargeError("the session's document would grow beyond 16 MiB")
        case driver.OperationFailure() if error.code == _NO_SUCH_PATH:
            return InvalidArgumentError("a key with dots leads through a stored value that holds no keys")
        case driver.OperationFailure() if _is_denied(error):
            return account().refused(error.code)
        case driver.OperationFailure():
            name = (error.details or {}).get("codeName", type(error).__name__)
            return DatabaseError(f"MongoDB refused the command: {name} (code {error.code})")
        case _:
            return DatabaseError(f"MongoDB failed: {type(error).__name__}")


def _is_denied(error: driver.OperationFailure) -> bool:
    if error.code == _ATLAS:
        return "bad auth" in str(error)
    return error.code == _UNAUTHORIZED or error.code in _NOT_AUTHENTICATED


def _first_line(error: driver.PyMongoError) -> str:
    line = str(error).splitlines()[0].partition(", Topology Description")[0].partition(", full error")[0]
    return re.sub(r" \(configured timeouts: [^)]*\)", "", line)
