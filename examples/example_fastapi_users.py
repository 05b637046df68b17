"""An application with users: they log in, get a token, and see only their own sessions. Several workers serve it.

install: pip install 'mongodb-session-manager[embedded,fastapi]' python-multipart uvicorn
run:     python example_fastapi_users.py
expect:  Four workers on port 8000, and a page with a form for each endpoint at http://127.0.0.1:8000/docs. In another
         terminal:

    curl -s http://127.0.0.1:8000/token -d 'username=ada&password=engine' | cut -d '"' -f 4 > ada.token
    curl -s http://127.0.0.1:8000/token -d 'username=grace&password=compiler' | cut -d '"' -f 4 > grace.token
    curl -N http://127.0.0.1:8000/sessions/trip/messages --oauth2-bearer $(cat ada.token) --json '{"text": "I am Ada."}'
    curl http://127.0.0.1:8000/sessions --oauth2-bearer $(cat ada.token)
    curl http://127.0.0.1:8000/sessions/trip/messages --oauth2-bearer $(cat grace.token)
    curl http://127.0.0.1:8000/sessions

Ada sees her session. Grace gets 404, as for a session that does not exist. Without a token, the answer is 401.

The data stays in the directory `users-data`. With a MongoDB server of your own and a secret that all workers share:

    MONGODB_URI=... TOKEN_SECRET=... uvicorn example_fastapi_users:app --workers 4
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
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

# Users and passwords.

USERS = {  # in place of your table of users: a salt and a hash by user id
    "ada": (
        "87121e42b606f54b1f436e94fe406822",
        "ef1de329b2bba4a3a7be2a48587865f0d338ac00061ac6e00bb7cf5262941ef9",
    ),  # the password is "engine"
    "grace": (
        "299ea5c038fba40435b682c484900c55",
        "72715e5e0dc7ca174f878fb3088f3cdde0fceb4b764ef7afd5b66fd8d22055f2",
    ),  # the password is "compiler"
}
NO_USER = ("", "")


def hashed(password: str, salt: str) -> str:
    """Return the hash of a password; it is slow by design."""
    return hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=5, dklen=32).hex()


# Tokens: a user id and an expiry date, signed so that only this server can make them.

LIFETIME = 3600  # seconds


def secret() -> bytes:
    """Return the key that signs the tokens. All workers need the same one."""
    return os.environ["TOKEN_SECRET"].encode()


def signed(payload: str) -> str:
    """Return a text with its signature."""
    return f"{payload}.{hmac.new(secret(), payload.encode(), hashlib.sha256).hexdigest()}"


def token_for(user: str) -> str:
    """Return a token for a user who has given the right password."""
    claims = {"sub": user, "exp": time.time() + LIFETIME}
    return signed(base64.urlsafe_b64encode(json.dumps(claims).encode()).decode())


def user_of(token: str) -> str | None:
    """Return the user of a token; `None` if the token is forged or has expired."""
    payload = token.partition(".")[0]
    if not hmac.compare_digest(token.encode(), signed(payload).encode()):
        return None
    claims = json.loads(base64.urlsafe_b64decode(payload))
    return str(claims["sub"]) if time.time() < claims["exp"] else None


async def current_user(token: Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="token"))]) -> str:
    """Return the id of the user who has sent the request."""
    if (user := user_of(token)) is None:
        raise HTTPException(401, "the token is not valid: log in again", {"WWW-Authenticate": "Bearer"})
    return user


# The application.


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the factory; the application does not start without MONGODB_URI and TOKEN_SECRET."""
    secret()
    async with session_lifespan(application_name="users")(app):
        yield


UserSession = Annotated[AsyncMongoDBSessionManager, session_dependency(owner=current_user)]

app = FastAPI(title="Users", lifespan=lifespan)
add_session_support(app)
app.get("/live")(live)
app.get("/ready")(ready)
app.include_router(sessions_router(owner=current_user))


class Token(BaseModel):
    """The response to a login, as OAuth2 defines it."""

    access_token: str
    token_type: str = "bearer"


class Prompt(BaseModel):
    """A message from the user."""

    text: Annotated[str, Field(min_length=1, max_length=100_000)]


@app.post("/token")
def log_in(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> Token:
    """Return a token for a user name and a password. `def` and not `async def`, because hashing takes time."""
    salt, stored = USERS.get(form.username, NO_USER)
    if not hmac.compare_digest(hashed(form.password, salt), stored):
        raise HTTPException(401, "the user name or the password is wrong")
    return Token(access_token=token_for(form.username))


@app.post("/sessions/{session_id}/messages", responses=responses)
async def answer(session: UserSession, prompt: Prompt) -> Response:
    """Stream the answer as Server-Sent Events."""
    # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
    agent = Agent(model=ScriptedModel(), agent_id="assistant", session_manager=session, callback_handler=None)
    return await stream(agent, prompt.text)


def main() -> None:
    """Serve the application on a demo server until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    demo_server("users-data")  # sets MONGODB_URI, which the workers inherit, like TOKEN_SECRET
    os.environ.setdefault("TOKEN_SECRET", secrets.token_hex(32))
    # uvicorn replaces a worker that does not answer in time, and a worker imports this file before it answers.
    uvicorn.run(
        "example_fastapi_users:app",
        port=options.port,
        workers=options.workers,
        timeout_worker_healthcheck=60,
    )


if __name__ == "__main__":
    main()
