"""The sessions of a request: the dependencies that open them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from inspect import Parameter, Signature
from typing import Annotated, Any, TypedDict, Unpack

from fastapi import Depends, Path
from fastapi.requests import HTTPConnection

from .. import AsyncMongoDBSessionManager, OnBusy, SaveOn
from .._managers.options import Options
from .._managers.user_hooks import Hook
from ._exchange import current_exchange
from ._factory import get_factory
from ._owner import checked_owner


class DependencyOptions(TypedDict, total=False):
    """The options of the sessions of a `session_dependency`; `SessionOptions` documents them."""

    application_name: str | None
    metadata_fields: Sequence[str] | None
    max_inline_attachment_bytes: int | None
    max_embedded_messages: int | None
    max_embedded_bytes: int | None
    session_ttl: timedelta | None
    title: str | None
    tags: Sequence[str] | None
    must_exist: bool | None
    metadata_hook: Hook | None
    feedback_hook: Hook | None
    save_on: SaveOn | None
    on_busy: OnBusy | None
    busy_timeout: float | None
    lease: float | None


class SessionOpener:
    """A dependency that opens the session that a path parameter names, after the dependency that returns the owner.

    Attributes:
        path: The name of the path parameter.
    """

    def __init__(self, path: str, owner: Callable[..., Any] | None, options: DependencyOptions) -> None:
        Options().replaced(options)  # refuses invalid options now instead of at each request
        self.path = path
        self._options = options
        self._has_owner = owner is not None
        # FastAPI reads this signature. It calls dependencies before it reads parameters, and calls no dependency
        # whose own dependencies raise an error.
        parameters = {"session_id": Annotated[str, Path(alias=path)], "connection": HTTPConnection}
        if owner is not None:
            parameters["owner"] = Annotated[Any, Depends(owner)]
        self.__signature__ = Signature(
            [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in parameters.items()]
        )

    async def __call__(
        self, session_id: str, connection: HTTPConnection, owner: Any = None
    ) -> AsyncMongoDBSessionManager:
        if self._has_owner:
            owner = checked_owner(owner)
        exchange, factory = current_exchange("close the session"), get_factory(connection)
        options = self._options
        if options.get("on_busy") is None and factory._options.on_busy == "conflict":
            options = {**options, "on_busy": "wait"}
        return await exchange.enter(factory.create_session_manager_async(session_id, owner=owner, **options))


def session_dependency(
    *,
    path: str = "session_id",
    owner: Callable[..., Any] | None = None,
    **options: Unpack[DependencyOptions],
) -> Any:
    """Return the dependency that opens a session for a request, to use in `Annotated`.

        UserSession = Annotated[AsyncMongoDBSessionManager, session_dependency(owner=current_user)]

        @app.post("/sessions/{session_id}/messages")
        async def answer(session: UserSession, prompt: Prompt) -> Response: ...

    The session is closed when the whole response is sent, including the last part of a stream, or when the client
    disconnects. A client that disconnects while its request waits for a busy session gives up its place.

    Share one dependency, such as the type above, between all parameters of a request: two different ones open the
    session twice, and the second waits for the first.

    Args:
        path: The name of the path parameter that is the id of the session. The application does not start if a route
            lacks it.
        owner: A FastAPI dependency, like `current_user`, that returns the id of the session's owner. It runs first:
            if it raises an error, like `HTTPException(401)`, nothing is sent to the database. The session of another
            owner is answered with 404. With `None`, the owner is that of the factory: none, unless it was given one.
        **options: `SessionOptions` documents them. The default of `on_busy` is `"wait"` here, unless the factory has
            `"refuse"`: of two requests that use a session at the same time, the later one waits. Endpoints that run
            no agent, like those for feedback, need no turn: pass `"conflict"`.

    Raises:
        ConfigurationError: An option is unknown or invalid.
        InvalidArgumentError: The title or the tags are invalid.
    """
    return Depends(SessionOpener(path, owner, options))


open_session = SessionOpener("session_id", None, {})
"""The dependency of `Session`, for `Depends(open_session)` and `app.dependency_overrides[open_session]`."""

Session = Annotated[AsyncMongoDBSessionManager, Depends(open_session)]
"""The type of a parameter that is the session of the path parameter `session_id`, opened with the defaults of
`session_dependency`: the session is created if it is new, and its owner is that of the factory."""
