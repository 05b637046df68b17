"""Sessions in a FastAPI application; needs the extra `fastapi`.

    UserSession = Annotated[AsyncMongoDBSessionManager, session_dependency(owner=current_user)]

    app = FastAPI(lifespan=session_lifespan("mongodb://localhost:27017/support"), responses=responses)
    add_session_support(app)
    app.get("/live")(live)
    app.get("/ready")(ready)

    class Prompt(BaseModel):
        text: str

    @app.post("/sessions/{session_id}/messages")
    async def answer(session: UserSession, prompt: Prompt) -> Response:
        return await stream(Agent(session_manager=session, callback_handler=None), prompt.text)

`current_user` is a dependency of yours that returns the id of the user, or raises `HTTPException(401)`. `Session` is
for applications without users.

Nothing here blocks the event loop. A client that disconnects in the middle of an answer stops the agent. Stored
messages stay stored, and the next request of the session continues from there.
"""

from __future__ import annotations

from ..errors import MissingExtraError

try:
    import fastapi as _fastapi  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "mongodb_session_manager.fastapi needs FastAPI: pip install 'mongodb-session-manager[fastapi]'", name=error.name
    ) from error

from ._answers import responses
from ._factory import Factory, get_factory, health, live, ready, session_lifespan
from ._router import sessions_router
from ._sessions import DependencyOptions, Session, open_session, session_dependency
from ._stream import stream
from ._support import add_session_support

__all__ = [
    "DependencyOptions",
    "Factory",
    "Session",
    "add_session_support",
    "get_factory",
    "health",
    "live",
    "open_session",
    "ready",
    "responses",
    "session_dependency",
    "session_lifespan",
    "sessions_router",
    "stream",
]
