"""An agent behind an HTTP endpoint: JSON answers, streamed answers, and the endpoints for a user's sessions.

install: pip install 'mongodb-session-manager[embedded,fastapi]' uvicorn
run:     uvicorn example_fastapi:app
expect:  A server on port 8000. In another terminal, these commands tell the agent a name, ask for it, rate the answer,
         and read the session:

    curl 'http://127.0.0.1:8000/sessions/ada-1/messages' -H 'X-User: ada' --json '{"text": "My name is Ada."}'
    curl 'http://127.0.0.1:8000/sessions/ada-1/stream' -H 'X-User: ada' --json '{"text": "What is my name?"}' -N
    curl 'http://127.0.0.1:8000/sessions/ada-1/feedback' -H 'X-User: ada' --json '{"rating": "up"}'
    curl 'http://127.0.0.1:8000/sessions/ada-1/feedback' -H 'X-User: ada'
    curl 'http://127.0.0.1:8000/sessions/ada-1/usage' -H 'X-User: ada'
    curl 'http://127.0.0.1:8000/sessions' -H 'X-User: ada'
    curl 'http://127.0.0.1:8000/ready'

A reverse proxy must authenticate the users, set the header X-User, and remove it from what the users send.
`example_fastapi_users.py` authenticates users itself.

The data stays in the directory `fastapi-data`: restart the server, and the agent still knows the name. To use your own
server, set the environment variable MONGODB_URI; several processes and machines can then serve the same sessions.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Response
from pydantic import BaseModel, Field
from strands import Agent

from mongodb_session_manager import AsyncMongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server
from mongodb_session_manager.fastapi import (
    add_session_support,
    live,
    ready,
    responses,
    session_dependency,
    session_lifespan,
    sessions_router,
    stream,
)


async def current_user(x_user: Annotated[str | None, Header()] = None) -> str:
    """Return the id of the user who has sent the request."""
    if not x_user:
        raise HTTPException(401, "the header X-User is missing")
    return x_user


UserSession = Annotated[AsyncMongoDBSessionManager, session_dependency(owner=current_user)]

app = FastAPI(lifespan=session_lifespan(demo_server("fastapi-data"), application_name="example"), responses=responses)
add_session_support(app)  # a busy session is answered with 409, an unreachable database with 503, ...
app.get("/live")(live)
app.get("/ready")(ready)
app.include_router(sessions_router(owner=current_user))  # list, messages, feedback, usage, rewind, fork, delete, ...


class Prompt(BaseModel):
    """A message from the user."""

    text: Annotated[str, Field(min_length=1, max_length=100_000)]


def make_agent(session: AsyncMongoDBSessionManager) -> Agent:
    """Return an agent that continues the session. Each request has an agent of its own."""
    # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
    model = ScriptedModel(delay=0.05)
    return Agent(model=model, agent_id="assistant", session_manager=session, callback_handler=None)


@app.post("/sessions/{session_id}/messages")
async def answer(session: UserSession, prompt: Prompt) -> dict[str, str]:
    """Return the whole answer, after it is stored."""
    result = await make_agent(session).invoke_async(prompt.text)
    return {"answer": str(result).strip()}


@app.post("/sessions/{session_id}/stream")
async def stream_answer(session: UserSession, prompt: Prompt) -> Response:
    """Stream the answer as plain text. The session stays open until the end of the stream."""
    return await stream(make_agent(session), prompt.text, format="text")
