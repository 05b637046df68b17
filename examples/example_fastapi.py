"""An agent behind an HTTP endpoint: a session per path, answers as JSON or token by token, ratings, a health check.

install: pip install 'mongodb-session-manager[embedded,fastapi]' uvicorn
run:     python examples/example_fastapi.py
expect:  a server on port 8000; in another terminal these lines tell the agent a name, ask for it, and rate the answer:

    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/messages' --json '{"text": "My name is Ada."}'
    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/stream' --json '{"text": "What is my name?"}' --no-buffer
    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/feedback' --json '{"rating": "up"}'
    curl 'http://127.0.0.1:8000/sessions/ada-1'
    curl 'http://127.0.0.1:8000/health'

--model and MONGODB_URI take a real model and a real server; see offline.py. With MONGODB_URI set, the sessions are
there after the server was restarted, and several servers may share them.
"""

from __future__ import annotations

from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel
from strands import Agent

from mongodb_session_manager import AsyncMongoDBSessionManager
from mongodb_session_manager.fastapi import Factory, Session, add_session_support, health, session_lifespan, stream
from offline import make_model, mongodb, option_parser

app = FastAPI(lifespan=session_lifespan(application_name="example"))  # connects to MONGODB_URI
app.state.model = "scripted"
add_session_support(app)  # a conflict is answered with 409, an unreachable database with 503, ...
app.get("/health")(health)


class Prompt(BaseModel):
    """What the user says."""

    text: str


class Feedback(BaseModel):
    """What the user thinks of it."""

    rating: Literal["up", "down"]
    comment: str = ""


def make_agent(session: Session) -> Agent:
    """Return an agent that goes on with the session; one is made per request."""
    return Agent(
        model=make_model(app.state.model), agent_id="assistant", session_manager=session, callback_handler=None
    )


@app.post("/sessions/{session_id}/messages")
async def answer(session: Session, prompt: Prompt) -> dict[str, str]:
    """Answer when the answer is complete and stored."""
    result = await make_agent(session).invoke_async(prompt.text)
    return {"answer": str(result).strip()}


@app.post("/sessions/{session_id}/stream")
async def answer_in_parts(session: Session, prompt: Prompt) -> Response:
    """Answer token by token; the session stays open until the last one is sent."""
    return await stream(make_agent(session), prompt.text, format="text")


async def existing(session_id: str, factory: Factory) -> AsyncMongoDBSessionManager:
    """Open a session that exists: `Session` would create it."""
    if not await factory.session_exists_async(session_id):
        raise HTTPException(404, "the session does not exist")
    return await factory.create_session_manager_async(session_id)


@app.post("/sessions/{session_id}/feedback", status_code=204)
async def rate(session_id: str, feedback: Feedback, factory: Factory) -> None:
    """Store a rating with the session."""
    async with await existing(session_id, factory) as session:
        await session.add_feedback(feedback.model_dump())


@app.get("/sessions/{session_id}")
async def show(session_id: str, factory: Factory) -> dict[str, Any]:
    """Return what the session cost and how it was rated."""
    async with await existing(session_id, factory) as session:
        return {"usage": (await session.get_usage())["total"], "feedbacks": await session.get_feedbacks()}


def main() -> None:
    """Serve the application."""
    parser = option_parser(__doc__)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app.state.model = options.model
    with mongodb():
        uvicorn.run(app, port=options.port)


if __name__ == "__main__":
    main()
