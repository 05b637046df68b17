"""Sessions in a FastAPI application; needs the extra `fastapi`.

    app = FastAPI(lifespan=session_lifespan("mongodb://localhost:27017/support"))
    add_session_support(app)
    app.get("/health")(health)

    @app.post("/sessions/{session_id}/messages")
    async def answer(session: Session, prompt: str) -> Response:
        return await stream(Agent(session_manager=session, callback_handler=None), prompt)

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

from ._factory import Factory, get_factory, health, session_lifespan
from ._router import sessions_router
from ._sessions import Session, add_session_support, open_session
from ._stream import stream

__all__ = [
    "Factory",
    "Session",
    "add_session_support",
    "get_factory",
    "health",
    "open_session",
    "session_lifespan",
    "sessions_router",
    "stream",
]
