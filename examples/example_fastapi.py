"""An agent behind an HTTP endpoint, with one session per path: JSON answers, streamed answers, ratings, health check.

install: pip install 'mongodb-session-manager[embedded,fastapi]' uvicorn
run:     uvicorn example_fastapi:app
expect:  A server on port 8000. In another terminal, these commands tell the agent a name, ask for it and rate the
         answer:

    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/messages' --json '{"text": "My name is Ada."}'
    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/stream' --json '{"text": "What is my name?"}' --no-buffer
    curl -X POST 'http://127.0.0.1:8000/sessions/ada-1/feedback' --json '{"rating": "up"}'
    curl 'http://127.0.0.1:8000/sessions/ada-1'
    curl 'http://127.0.0.1:8000/health'

The data stays in the directory `fastapi-data`: restart the server, and the agent still knows the name. To use your own
server, set the environment variable MONGODB_URI; several processes and machines can then serve the same sessions.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel
from strands import Agent

from mongodb_session_manager import AsyncMongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server
from mongodb_session_manager.fastapi import Factory, Session, add_session_support, health, session_lifespan, stream

app = FastAPI(lifespan=session_lifespan(demo_server("fastapi-data"), application_name="example"))
add_session_support(app)  # a conflict is answered with 409, an unreachable database with 503, ...
app.get("/health")(health)


class Prompt(BaseModel):
    """A message from the user."""

    text: str


class Feedback(BaseModel):
    """A rating from the user."""

    rating: Literal["up", "down"]
    comment: str = ""


def make_agent(session: Session) -> Agent:
    """Return an agent that continues the session. Each request has an agent of its own."""
    # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
    model = ScriptedModel(delay=0.05)
    return Agent(model=model, agent_id="assistant", session_manager=session, callback_handler=None)


@app.post("/sessions/{session_id}/messages")
async def answer(session: Session, prompt: Prompt) -> dict[str, str]:
    """Return the whole answer, after it is stored."""
    result = await make_agent(session).invoke_async(prompt.text)
    return {"answer": str(result).strip()}


@app.post("/sessions/{session_id}/stream")
async def stream_answer(session: Session, prompt: Prompt) -> Response:
    """Stream the answer as plain text. The session stays open until the end of the stream."""
    return await stream(make_agent(session), prompt.text, format="text")


async def existing(session_id: str, factory: Factory) -> AsyncMongoDBSessionManager:
    """Open a session that exists. `Session` would create it."""
    if not await factory.session_exists_async(session_id):
        raise HTTPException(404, "the session does not exist")
    return await factory.create_session_manager_async(session_id)


@app.post("/sessions/{session_id}/feedback", status_code=204)
async def rate(session_id: str, feedback: Feedback, factory: Factory) -> None:
    """Store a rating in the session."""
    async with await existing(session_id, factory) as session:
        await session.add_feedback(feedback.model_dump())


@app.get("/sessions/{session_id}")
async def show(session_id: str, factory: Factory) -> dict[str, Any]:
    """Return the session's usage and ratings."""
    async with await existing(session_id, factory) as session:
        return {"usage": (await session.get_usage())["total"], "feedbacks": await session.get_feedbacks()}
