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

from collections.abc import AsyncIterator
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from strands import Agent

from mongodb_session_manager.fastapi import Session, add_session_support, health, session_lifespan
from offline import make_model, mongodb, option_parser

app = FastAPI(lifespan=session_lifespan(application_name="example"))  # connects to MONGODB_URI
app.state.model = "scripted"
add_session_support(app)  # a conflict is answered with 409, a database that is away with 503, ...
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
async def stream(session: Session, prompt: Prompt) -> StreamingResponse:
    """Answer token by token; the session stays open until the last one is sent."""
    agent = make_agent(session)

    async def tokens() -> AsyncIterator[str]:
        async for event in agent.stream_async(prompt.text):
            if "data" in event:
                yield event["data"]

    return StreamingResponse(tokens(), media_type="text/plain")


@app.post("/sessions/{session_id}/feedback", status_code=204)
async def rate(session: Session, feedback: Feedback) -> None:
    """Store a rating with the session."""
    await session.add_feedback(feedback.model_dump())


@app.get("/sessions/{session_id}")
async def show(session: Session) -> dict[str, Any]:
    """Return what the session cost and how it was rated."""
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
