"""The responses to errors: HTTP statuses and WebSocket close codes."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pydantic import BaseModel
from strands.types.exceptions import EventLoopException

from .. import errors

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """The response to an error. It says what the client can do and contains no details of the server.

    Attributes:
        status: The HTTP status.
        close_code: The close code of a WebSocket.
        detail: The text; empty for an invalid argument, because that error names the argument and the reason itself.
    """

    status: int
    close_code: int
    detail: str

    @property
    def headers(self) -> dict[str, str]:
        """The header `Retry-After` in seconds, if the client can repeat the request."""
        return RETRY_AFTER if self.close_code == 1013 else {}


RETRY_AFTER = {"Retry-After": "1"}


# The status of an invalid argument is 422, as in FastAPI's own validation. The WebSocket close codes are 1008 (the
# client must send another request), 1013 (try again later) and 1011 (server error).
ANSWERS: dict[type[errors.MongoDBSessionError], Answer] = {
    errors.SessionBusyError: Answer(409, 1013, "the session is busy with another request: repeat this one later"),
    errors.SessionConflictError: Answer(409, 1013, "another request changed the session concurrently: repeat this one"),
    errors.SessionExistsError: Answer(409, 1008, "a session with that id already exists"),
    errors.SessionNotFoundError: Answer(404, 1008, "the session does not exist"),
    errors.AgentNotFoundError: Answer(404, 1008, "the session has no such agent"),
    errors.MessageNotFoundError: Answer(404, 1008, "the agent has no such message"),
    errors.InvalidArgumentError: Answer(422, 1008, ""),
    errors.EncodingError: Answer(422, 1008, "a value cannot be stored"),
    errors.MessageTooLargeError: Answer(413, 1008, "the message is too large"),
    errors.StateTooLargeError: Answer(413, 1008, "the session is too large"),
    errors.DatabaseUnavailableError: Answer(503, 1013, "the database is unreachable: try again later"),
    errors.DatabaseTimeoutError: Answer(503, 1013, "the database takes too long: try again later"),
    errors.DatabaseError: Answer(500, 1011, "the database refused a command"),
    errors.ConfigurationError: Answer(500, 1011, "the server is not configured correctly"),
}
UNEXPECTED = Answer(500, 1011, "the request failed")
"""The response to any other error, which is a bug of the application."""


class ErrorDetail(BaseModel):
    """The body of an error response."""

    detail: str


class InvalidRequest(BaseModel):
    """The body of a response to an invalid request: a text, or the list of errors of FastAPI's validation."""

    detail: str | list[dict[str, Any]]


_REPEATABLE = {
    "Retry-After": {"description": "Seconds until the request can be repeated.", "schema": {"type": "integer"}}
}

responses: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorDetail, "description": "The session, the agent or the message does not exist."},
    409: {
        "model": ErrorDetail,
        "description": "The session is busy or was changed by another request, or the id of a new session is taken.",
        "headers": _REPEATABLE,
    },
    413: {"model": ErrorDetail, "description": "The message or the session is too large."},
    422: {"model": InvalidRequest, "description": "The request is invalid."},
    503: {"model": ErrorDetail, "description": "The database is unreachable or too slow.", "headers": _REPEATABLE},
}
"""The statuses of `add_session_support` for OpenAPI, as `responses` of an application, a router or a route."""


def original(error: BaseException) -> BaseException:
    """Return the error that Strands wrapped in a later cycle of an invocation, else the error itself."""
    while isinstance(error, EventLoopException):
        error = error.original_exception
    return error


def answer_to(error: BaseException) -> Answer:
    error = original(error)
    answer = next((answer for kind, answer in ANSWERS.items() if isinstance(error, kind)), UNEXPECTED)
    return answer if answer.detail else answer._replace(detail=str(error))


def log(path: str, error: BaseException) -> None:
    """Log an error that the client did not cause: a database error in one line, a bug with its traceback."""
    answer = answer_to(error)
    if answer is UNEXPECTED:
        logger.error("path=<%r> | the request failed", path, exc_info=error)
    elif answer.status >= 500:
        level = logging.WARNING if answer.status == 503 else logging.ERROR
        logger.log(level, "path=<%r>, error=<%s> | answered %d", path, original(error), answer.status)
