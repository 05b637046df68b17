"""`sessions_router`: the endpoints for the sessions of a user."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Scope
from strands.types.session import SessionMessage

from .. import MongoDBSessionManagerFactory, Order
from ..errors import ConfigurationError, InvalidArgumentError, SessionNotFoundError, raise_alone
from ._answers import ErrorDetail, responses
from ._bodies import (
    Feedback,
    FeedbackList,
    Fork,
    Forked,
    MessageList,
    Metadata,
    Rewind,
    SessionChanges,
    SessionEntry,
    SessionList,
    Usage,
)
from ._exchange import current_exchange
from ._factory import get_factory
from ._json import json_response
from ._owner import checked_owner

_OWNER = "mongodb_session_manager.owner"
"""The key, in the scope of a request, of the owner whose sessions it may use; `None` for all sessions."""

_MAX_ERRORS = 10
"""The maximum number of invalid fields that a response names."""


class _Caller(NamedTuple):
    """The factory of a request, and the owner whose sessions the request may use."""

    factory: MongoDBSessionManagerFactory
    scope: Scope

    @property
    def owner(self) -> str | None:
        found: str | None = self.scope[_OWNER]
        return found


async def _caller(connection: HTTPConnection) -> _Caller:
    current_exchange("handle errors")
    # There is no owner yet if a parameter of its dependency is invalid: FastAPI calls this dependency all the same.
    return _Caller(get_factory(connection), connection.scope)


Caller = Annotated[_Caller, Depends(_caller)]
Limit = Annotated[int, Query(ge=1, le=100)]


def _authentication(owner: Callable[..., Any] | None) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return the dependency that finds the owner; it runs before the others of an endpoint."""
    if owner is None:

        async def administrate(connection: HTTPConnection) -> None:
            connection.scope[_OWNER] = None

        return administrate

    async def authenticate(connection: HTTPConnection, found: Any = Depends(owner)) -> None:  # noqa: B008 - per router
        connection.scope[_OWNER] = checked_owner(found)

    return authenticate


async def list_sessions(
    caller: Caller,
    limit: Limit = 20,
    cursor: Annotated[str | None, Query(description="The `next_cursor` of the previous page.")] = None,
    order: Order = "-updated_at",
    tags: Annotated[list[str] | None, Query(description="Only sessions with all of these tags.")] = None,
    application_name: str | None = None,
    created_after: datetime | None = None,
    updated_after: datetime | None = None,
) -> Response:
    """List sessions, by default the last used ones first."""
    criteria = (application_name, None, created_after, updated_after)
    page = await caller.factory.list_sessions_async(*criteria, order, limit, cursor, tags=tags, owner=caller.owner)
    sessions = [_fields(SessionEntry, summary) for summary in page.sessions]
    return await json_response({"sessions": sessions, "next_cursor": page.next_cursor})


async def get_session(session_id: str, caller: Caller) -> Response:
    """Return a session without its messages."""
    summary = await caller.factory.get_session_summary_async(session_id, owner=caller.owner)
    return await json_response(_fields(SessionEntry, summary))


async def update_session(session_id: str, changes: SessionChanges, caller: Caller) -> None:
    """Change the title and the tags of a session."""
    given = changes.model_dump(exclude_unset=True)
    await caller.factory.update_session_async(session_id, **given, owner=caller.owner)


async def delete_session(session_id: str, caller: Caller) -> None:
    """Delete a session with everything that belongs to it."""
    if not await caller.factory.delete_session_async(session_id, owner=caller.owner):
        raise SessionNotFoundError(f"session {session_id!r} does not exist")


async def list_messages(
    session_id: str,
    caller: Caller,
    agent_id: Annotated[str | None, Query(description="Required for a session with several agents.")] = None,
    limit: Limit = 20,
    before: Annotated[int | None, Query(ge=0, description="The `next_before` of the previous page.")] = None,
) -> Response:
    """List the messages of an agent, newest first."""
    found: list[SessionMessage] = []
    if agent_id is None:
        agent_id = await _only_agent(session_id, caller)
    if agent_id is not None:
        found = await caller.factory.list_messages_async(
            session_id, agent_id, limit, newest_first=True, before=before, owner=caller.owner
        )
    # The id of the first message is 0.
    next_before = found[-1].message_id or None if found else None
    return await json_response(
        {"agent_id": agent_id, "messages": [_entry(message) for message in found], "next_before": next_before}
    )


async def _only_agent(session_id: str, caller: _Caller) -> str | None:
    """Return the agent of a session that has one, or `None` if it has none.

    Raises:
        InvalidArgumentError: It has several.
    """
    agents = (await caller.factory.get_session_summary_async(session_id, owner=caller.owner)).agents
    if len(agents) > 1:
        raise InvalidArgumentError(f"agent_id must be one of {', '.join(map(repr, agents))}")
    return agents[0] if agents else None


def _entry(message: SessionMessage) -> dict[str, Any]:
    shown = message.to_message()
    return {
        "message_id": message.message_id,
        "role": shown["role"],
        "content": shown["content"],
        "redacted": message.redact_message is not None,
        "created_at": message.created_at,
        "updated_at": message.updated_at,
    }


async def get_metadata(session_id: str, caller: Caller) -> Response:
    """Return the metadata of a session."""
    found = await caller.factory.get_metadata_async(session_id, owner=caller.owner)
    if not found:
        raise SessionNotFoundError(f"session {session_id!r} does not exist")
    return await json_response({"metadata": found["metadata"]})


async def update_metadata(session_id: str, changes: Metadata, caller: Caller) -> None:
    """Set keys of the metadata of a session."""
    await caller.factory.update_metadata_async(session_id, changes.metadata, owner=caller.owner)


async def list_feedback(session_id: str, caller: Caller) -> Response:
    """List the feedback of a session, oldest first."""
    return await json_response({"feedbacks": await caller.factory.get_feedbacks_async(session_id, owner=caller.owner)})


async def add_feedback(session_id: str, feedback: Feedback, caller: Caller) -> None:
    """Append feedback to a session."""
    given = feedback.model_dump(exclude_unset=True)
    await caller.factory.add_feedback_async(session_id, given, owner=caller.owner)


async def get_usage(session_id: str, caller: Caller) -> Response:
    """Return the running totals of a session."""
    return await json_response(await caller.factory.get_usage_async(session_id, owner=caller.owner))


async def rewind_session(session_id: str, rewind: Rewind, caller: Caller) -> None:
    """Remove the messages of a session after a given one."""
    await caller.factory.rewind_session_async(session_id, rewind.at_message, keep_as=rewind.keep_as, owner=caller.owner)


async def fork_session(session_id: str, fork: Fork, caller: Caller) -> Response:
    """Copy a session, or its beginning, to a new one."""
    await caller.factory.fork_session_async(session_id, fork.new_id, fork.at_message, owner=caller.owner)
    location = f"../{quote(fork.new_id, safe='')}"  # relative, because proxies and mounts change the path
    return await json_response({"session_id": fork.new_id}, 201, {"Location": location})


@dataclass(frozen=True)
class _Operation:
    """An endpoint and its OpenAPI documentation.

    Attributes:
        endpoint: The function.
        method: The HTTP method.
        path: The path below the prefix of the router.
        model: The body of the response; `None` for 204.
        status: The status of success.
    """

    endpoint: Callable[..., Coroutine[Any, Any, Any]]
    method: str
    path: str
    model: type[BaseModel] | None = None
    status: int = 204

    @property
    def errors(self) -> dict[int | str, dict[str, Any]]:
        """The documented error responses."""
        statuses = [503]
        if self.path:
            statuses += [404]
        if self.method != "GET":
            statuses += [409, 413]
        invalid = {**responses[422], "model": ErrorDetail}  # see `_Route`
        return {422: invalid, **{status: responses[status] for status in statuses}}


_SESSION = "/{session_id}"
_OPERATIONS = (
    _Operation(list_sessions, "GET", "", SessionList, 200),
    _Operation(get_session, "GET", _SESSION, SessionEntry, 200),
    _Operation(update_session, "PATCH", _SESSION),
    _Operation(delete_session, "DELETE", _SESSION),
    _Operation(list_messages, "GET", f"{_SESSION}/messages", MessageList, 200),
    _Operation(get_metadata, "GET", f"{_SESSION}/metadata", Metadata, 200),
    _Operation(update_metadata, "PATCH", f"{_SESSION}/metadata"),
    _Operation(list_feedback, "GET", f"{_SESSION}/feedback", FeedbackList, 200),
    _Operation(add_feedback, "POST", f"{_SESSION}/feedback"),
    _Operation(get_usage, "GET", f"{_SESSION}/usage", Usage, 200),
    _Operation(rewind_session, "POST", f"{_SESSION}/rewind"),
    _Operation(fork_session, "POST", f"{_SESSION}/fork", Forked, 201),
)


class _Route(APIRoute):
    """A route that answers an invalid parameter like any other error, and does not repeat its value."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise_alone(InvalidArgumentError(_named(error)))

        return handled


def _named(error: RequestValidationError) -> str:
    """Return the invalid fields with the reasons."""
    fields = []
    for each in error.errors()[:_MAX_ERRORS]:
        where, *within = map(str, each["loc"])
        name = ".".join(within) if within and each["type"] != "json_invalid" else where
        fields.append(f"{name[:100]}: {each['msg']}")
    return "; ".join(fields).encode("utf-8", "replace").decode()  # a key can contain a lone surrogate


def _fields(model: type[BaseModel], value: object) -> dict[str, Any]:
    """Return the attributes of an object that are fields of a model, unchecked: stored values can be of any type."""
    return {name: getattr(value, name) for name in model.model_fields}


def sessions_router(
    *,
    owner: Callable[..., Any] | None,
    prefix: str = "/sessions",
    exclude: Collection[str] = (),
    **options: Any,
) -> APIRouter:
    """Return a router with endpoints for the sessions of the user who sends the request.

        app.include_router(sessions_router(owner=current_user))

    | operation | endpoint | answer |
    |---|---|---|
    | `list_sessions` | `GET /sessions?limit=&cursor=&tags=` | the last used sessions, and the cursor of the next page |
    | `get_session` | `GET /sessions/{session_id}` | labels, dates, metadata, agents, message counts, usage |
    | `update_session` | `PATCH /sessions/{session_id}` `{title, tags}` | 204 |
    | `delete_session` | `DELETE /sessions/{session_id}` | 204 |
    | `list_messages` | `GET .../messages?limit=&before=&agent_id=` | newest first, and the `before` of the next page |
    | `get_metadata` | `GET .../metadata` | the metadata |
    | `update_metadata` | `PATCH .../metadata` `{metadata}` | 204 |
    | `list_feedback` | `GET .../feedback` | all feedback, oldest first |
    | `add_feedback` | `POST .../feedback` `{rating, comment}` and any other fields | 204 |
    | `get_usage` | `GET .../usage` | the running totals, by agent and overall |
    | `rewind_session` | `POST .../rewind` `{at_message, keep_as}` | 204 |
    | `fork_session` | `POST .../fork` `{new_id, at_message}` | 201 with the id, and its address in `Location` |

    A session of another owner, or of none, is answered with 404, as if it did not exist; this takes no further command.
    `add_session_support` lists the other errors; call it for the application. `agent_id` can be omitted if the session
    has one agent. Lists have at most 100 entries, default 20.

    Messages contain tool calls and their results. The bytes of images and documents are base64 text; dates are ISO 8601
    text; NaN is null. The hooks of the factory apply to metadata and feedback. A user can change all metadata of a
    session: exclude `update_metadata` if your application trusts it. A session whose id contains a slash
    cannot be addressed.

    Args:
        owner: A dependency that returns the id of the authenticated user, such as a function that reads a token. It
            runs first: if it raises `HTTPException(401)`, no command is sent. `None` gives every caller access to all
            sessions, or to those of the owner of the factory: for administration.
        prefix: The path of the list, with which all other paths begin.
        exclude: The names of operations to leave out.
        **options: As for `APIRouter`, like `dependencies`, `responses` or `include_in_schema`. `tags`, which group
            endpoints in the documentation, default to `["sessions"]`.

    Raises:
        ConfigurationError: `exclude` names an unknown operation, or `owner` is not callable.
    """
    if owner is not None and not callable(owner):
        raise ConfigurationError(f"owner must be a dependency that returns the owner, or None, got {owner!r}")
    names = [operation.endpoint.__name__ for operation in _OPERATIONS]
    if unknown := [name for name in exclude if name not in names]:
        raise ConfigurationError(f"exclude must contain only {', '.join(names)}; got {unknown[0]!r}")
    dependencies = [Depends(_authentication(owner)), *(options.pop("dependencies", None) or ())]
    options = {"tags": ["sessions"], "route_class": _Route, **options}
    router = APIRouter(prefix=prefix, dependencies=dependencies, **options)
    for operation in _OPERATIONS:
        if operation.endpoint.__name__ not in exclude:
            router.add_api_route(
                operation.path,
                operation.endpoint,
                methods=[operation.method],
                response_model=operation.model,
                status_code=operation.status,
                responses=operation.errors,
            )
    return router
