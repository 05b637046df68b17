"""The examples, copied out alone and run as their first lines say."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pymongo
import pytest

import interpreter
from documented import ROOT, uri_of
from support import eventually

Documents = pymongo.collection.Collection[dict[str, Any]]

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
UVICORN = "import runpy, sys; sys.argv[0] = 'uvicorn'; runpy.run_module('uvicorn', run_name='__main__')"


class Example:
    """An example in a directory of its own. It uses the test's database, or starts a server as it does by default."""

    def __init__(self, uri: str) -> None:
        self._environment = {**os.environ, "MONGODB_URI": uri}
        self.uri = uri

    def without_server(self) -> Example:
        del self._environment["MONGODB_URI"]
        return self

    def commands(self, name: str) -> list[tuple[str | Path, list[str]]]:
        """Copy an example and return its programs and their arguments, as its `run:` line names them."""
        shutil.copy(EXAMPLES / name, ".")
        found = re.search("^run: +(.+)$", (EXAMPLES / name).read_text(), re.MULTILINE)
        assert found is not None
        commands = [shlex.split(command) for command in found[1].split("&&")]
        return [
            (UVICORN, arguments) if program == "uvicorn" else (Path(arguments[0]), arguments[1:])
            for program, *arguments in commands
        ]

    def run(self, name: str) -> list[str]:
        """Run an example and return the lines it printed, without the random part of session ids."""
        printed = ""
        for code, arguments in self.commands(name):
            shown, errors = interpreter.run(code, *arguments, env=self._environment)
            assert errors == ""
            printed += shown
        return re.sub(r"-[0-9a-f]{8}\b", "-#", printed).splitlines()

    @contextmanager
    def serving(self, name: str, *options: Any) -> Iterator[str]:
        """Run an example that is a server on a free port, yield its address, and end it as Ctrl+C does."""
        [(code, arguments)] = self.commands(name)
        process = interpreter.start(code, *arguments, *options, "--port", 0, env=self._environment)
        logged = ""
        try:
            for line in process.stderr:
                logged += line
                if found := re.search(r"running on (http://[\d.:]+)", line):
                    yield found[1]
                    break
        finally:
            process.send_signal(signal.SIGINT)
            logged += process.communicate()[1]
        assert process.returncode in (0, -signal.SIGINT), logged
        assert "Application shutdown complete." in logged
        assert "Traceback" not in logged


@pytest.fixture
def example(server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    monkeypatch.chdir(tmp_path)
    return Example(uri_of(server, database))


def test_examples_import_no_module_of_this_checkout() -> None:
    folders = [EXAMPLES, ROOT / "tests", ROOT / "benchmarks"]
    ours = {part for folder in folders for path in folder.rglob("*.py") for part in (folder.name, path.stem)}
    for name in NAMES:
        imports = re.findall(r"^ *(?:from|import) ([\w.]+)", (EXAMPLES / name).read_text(), re.MULTILINE)
        assert not {module.partition(".")[0] for module in imports} & ours, name


def test_every_example_says_what_to_install_to_run_and_to_expect_and_where_another_model_goes() -> None:
    for name in NAMES:
        source = (EXAMPLES / name).read_text()
        run = rf"(python {name}|uvicorn {name.removesuffix('.py')}:app)"
        first_lines = rf"^install: pip install '.+\nrun:     {run}.*\nexpect:  \w"
        assert re.search(first_lines, source, re.MULTILINE), name
        assert re.search(r"# In place of ScriptedModel, a.* BedrockModel\(", source), name


def test_the_table_of_examples_is_complete() -> None:
    named = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \| \w", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == [(name, name) for name in NAMES]


def test_quickstart_with_a_server_of_its_own(example: Example) -> None:
    lines = example.without_server().run("quickstart.py")
    assert [re.sub(r"process \d+", "process #", line) for line in lines] == [
        "process # restored 0 messages",
        "  user:  Hello, my name is Ada.",
        "  agent: Hello! I have been sent 1 message.",
        "process # restored 2 messages",
        "  user:  What is my name?",
        "  agent: Your name is Ada.",
    ]


def test_calculator_tool_with_a_server_of_its_own(example: Example) -> None:
    assert example.without_server().run("example_calculator_tool.py") == [
        "answer: 12 times 34 is 408.",
        "restored 4 messages:",
        "  user: What is 12 times 34? Use the calculator.",
        "  assistant: calls calculator with {'left': 12, 'operation': '*', 'right': 34}",
        "  user: gets 408.0",
        "  assistant: 12 times 34 is 408.",
    ]


def test_metadata_tool(example: Example) -> None:
    assert example.run("example_metadata_tool.py") == [
        "user:  I am vegetarian.",
        "agent: I noted that you are vegetarian.",
        "user:  Set my plan to gold.",
        "agent: I cannot change your plan.",
        "tool:  Metadata updated: preferences.diet.",
        "tool:  Error: the key 'plan' is not one of preferences",
        "stored: {'plan': 'silver', 'preferences': {'diet': 'vegetarian'}}",
    ]


def test_metadata_hook(example: Example) -> None:
    assert example.run("example_metadata_hook.py") == [
        "hook: update {'metadata': {'customer': 'Ada'}}",
        "hook: update {'metadata': {'topic': 'invoices'}}",
        "agent: This conversation is about invoices.",
        "refused: card numbers are not stored",
        "hook: get",
        "stored: {'customer': 'Ada', 'topic': 'invoices'}",
    ]


def test_feedback_hook(example: Example) -> None:
    assert example.run("example_feedback_hook.py") == [
        "agent: Next Monday.",
        "alarm: bad feedback: It did not arrive.",
        "stored: up web ",
        "stored: down web It did not arrive.",
    ]


def test_aws_hooks(example: Example) -> None:
    assert example.run("example_aws_hooks.py") == [
        "agent: Your refund is on its way.",
        "notifications: 2 delivered, 0 failed",
        r"SNS: '[negative] on session aws-#', 'Session: aws-#\n\nToo slow.'",
        "SQS: metadata_update, update {'status': 'solved'}",
    ]


def test_multi_agent(example: Example) -> None:
    assert example.run("example_multi_agent.py") == [
        "A first process:",
        "  researcher starts",
        "  writer starts",
        "It ended with SIGKILL. A second process:",
        "  writer starts",
        "  editor starts",
        "  result: MongoDB stores documents.",
    ]


def test_guardrail_audit(example: Example) -> None:
    assert example.run("example_guardrail_audit.py") == [
        "user:  Good afternoon.",
        "agent: Good afternoon!",
        "user:  My card number is 4111 1111 1111 1111.",
        "agent: I cannot help with that.",
        "stored:",
        "  user: Good afternoon.",
        "  assistant: Good afternoon!",
        "  user: [blocked by the guardrail]",
        "  assistant: I cannot help with that.",
        "audit:",
        "  guarded-#: BLOCKED message 2 of assistant",
    ]


def test_sync_script(example: Example) -> None:
    first, second = (example.run("example_sync_script.py") for _ in range(2))
    assert first == [
        "restored 0 messages",
        "user:  My name is Ada.",
        "agent: Hello! I have been sent 1 message.",
        "user:  What is my name?",
        "agent: Your name is Ada.",
        "messages: 4",
        "tokens: 30",
    ]
    assert second[0] == "restored 4 messages"
    assert "messages: 8" in second


def curl(line: str, client: httpx.Client) -> httpx.Response:
    """Send what a line of curl would, to the address of a client."""
    arguments = shlex.split(line)
    values = {name: value for name, value in itertools.pairwise(arguments) if name in ("--json", "-H")}
    body = json.loads(values["--json"]) if "--json" in values else None
    headers = dict([values["-H"].split(": ")]) if "-H" in values else {}
    url = next(argument for argument in arguments if argument.startswith("http"))
    path = url.removeprefix("http://127.0.0.1:8000")
    return client.request("GET" if body is None else "POST", path, json=body, headers=headers)


def test_fastapi(example: Example, stored: Documents) -> None:
    lines = re.findall(r"^    (curl .*)$", (EXAMPLES / "example_fastapi.py").read_text(), re.MULTILINE)
    with (
        example.serving("example_fastapi.py") as address,
        httpx.Client(base_url=address, timeout=60, verify=False) as client,
    ):
        said, asked, _, feedback, usage, listed, ready = answers = [curl(line, client) for line in lines]
        bad = curl("curl http://127.0.0.1:8000/sessions/a%00b -H 'X-User: ada'", client)
        unauthenticated = curl("""curl http://127.0.0.1:8000/sessions/b/messages --json '{"text": "Hello"}'""", client)
        unknown = [
            curl("curl http://127.0.0.1:8000/sessions/unknown -H 'X-User: ada'", client),
            curl("curl http://127.0.0.1:8000/sessions/ada-1 -H 'X-User: bob'", client),
            *(curl(line.replace("X-User: ada", "X-User: bob"), client) for line in lines[:5]),
        ]
    assert stored.distinct("_id") == ["ada-1"]
    assert {(answer.status_code, answer.json()["detail"]) for answer in unknown} == {
        (404, "the session does not exist")
    }
    assert [answer.status_code for answer in answers] == [200, 200, 204, 200, 200, 200, 200]
    assert said.json() == {"answer": "Hello! I have been sent 1 message."}
    assert asked.text == "Your name is Ada."
    assert [each["rating"] for each in feedback.json()["feedbacks"]] == ["up"]
    assert usage.json()["total"]["invocations"] == 2
    assert [each["session_id"] for each in listed.json()["sessions"]] == ["ada-1"]
    assert ready.json() == {"status": "ok"}
    assert (unauthenticated.status_code, unauthenticated.json()) == (401, {"detail": "the header X-User is missing"})
    assert (bad.status_code, bad.json()) == (422, {"detail": "session_id must not contain a NUL character"})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full_adversity)])
def test_users_see_only_their_own_sessions_in_any_worker(example: Example, stored: Documents, workers: int) -> None:
    with example.serving("example_fastapi_users.py", "--workers", workers) as address:
        with httpx.Client(base_url=address, timeout=60, verify=False) as client:
            eventually(lambda: is_live(client), 60)  # uvicorn names its address before its workers have imported it

            def log_in(user: str, password: str) -> httpx.Response:
                return client.post("/token", data={"username": user, "password": password})

            def ask(path: str, token: str | None, **body: Any) -> httpx.Response:
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                return client.request("POST" if body else "GET", path, headers=headers, json=body or None)

            ada, grace = (log_in(*user).json()["access_token"] for user in (("ada", "engine"), ("grace", "compiler")))
            wrong = [log_in("ada", "compiler"), log_in("nobody", "engine")]
            answers = [ask("/sessions/a/messages", ada, text=f"Message {number}") for number in range(2)]
            ask("/sessions/g/messages", grace, text="Hello")
            lists = [ask("/sessions", token).json()["sessions"] for token in (ada, grace)]
            others = [ask(path, grace) for path in ("/sessions/a", "/sessions/a/messages", "/sessions/unknown")]
            others.append(ask("/sessions/a/messages", grace, text="Hello"))
            forged = [None, "x.y", f"{ada}0", ada[1:], grace.partition(".")[0] + "." + ada.partition(".")[2]]
            refused = [ask("/sessions/new/messages", token, text="Hello") for token in forged]
            refused += [ask("/sessions", token) for token in forged]
        assert sorted(stored.distinct("_id")) == ["a", "g"]
        printed = as_its_first_lines_say("example_fastapi_users.py", address) if shutil.which("curl") else None
    assert {answer.status_code for answer in (*wrong, *refused)} == {401}
    assert {answer.status_code for answer in answers} == {200}
    assert "sent 3 messages" in "".join(re.findall('"(.*?)"', answers[1].text)[:-2])
    assert [[each["session_id"] for each in sessions] for sessions in lists] == [["a"], ["g"]]
    assert {(answer.status_code, answer.json()["detail"]) for answer in others} == {(404, "the session does not exist")}
    if printed is not None:
        said, listed, of_another, unauthenticated = printed[-4:]
        assert "event: done" in said
        assert [each["session_id"] for each in json.loads(listed)["sessions"]] == ["trip", "a"]
        assert json.loads(of_another) == {"detail": "the session does not exist"}
        assert json.loads(unauthenticated) == {"detail": "Not authenticated"}


def is_live(client: httpx.Client) -> bool:
    try:
        return client.get("/live").status_code == 200
    except httpx.ConnectError:
        return False


def as_its_first_lines_say(name: str, address: str) -> list[str]:
    """Give the commands of an example to a shell, with another address; return what each prints."""
    commands = re.findall(r"^    (curl .*)$", (EXAMPLES / name).read_text(), re.MULTILINE)
    return [
        subprocess.run(
            ["bash", "-c", command.replace("http://127.0.0.1:8000", address)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    ]
