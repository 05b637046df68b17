"""The examples, run as their first lines say."""

from __future__ import annotations

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
from urllib.parse import urlsplit

import httpx
import pymongo
import pytest
from strands.models import BedrockModel

import interpreter
from offline import make_model, option_parser

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("offline.py", "scripted_model.py"))


@pytest.fixture
def environment(embedded: str, database: str) -> dict[str, str]:
    """An environment in which examples use the test's own database."""
    return {**os.environ, "MONGODB_URI": urlsplit(embedded)._replace(path=f"/{database}").geturl()}


def run(name: str, environment: dict[str, str], *arguments: str) -> list[str]:
    """Run an example and return the lines it printed, with the random part of session ids left out."""
    shown, errors = interpreter.run(EXAMPLES / name, *arguments, env=environment, timeout=110)
    assert errors == ""
    return re.sub(r"-[0-9a-f]{8}\b", "-#", shown).splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_every_example_says_what_to_install_to_run_and_to_expect(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    assert re.search(
        rf"^install: pip install '.+\nrun:     python examples/{name}.*\nexpect:  \w", source, re.MULTILINE
    )


def test_the_table_of_examples_is_complete() -> None:
    named = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \| \w", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == [(name, name) for name in NAMES]


def test_calculator_tool_with_a_server_of_its_own() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MONGODB_URI"}
    assert run("example_calculator_tool.py", environment) == [
        "answer: 12 times 34 is 408.",
        "restored 4 messages:",
        "  user: What is 12 times 34? Use the calculator.",
        "  assistant: calls calculator with {'left': 12, 'operation': '*', 'right': 34}",
        "  user: gets 408.0",
        "  assistant: 12 times 34 is 408.",
    ]


def test_metadata_tool(environment: dict[str, str]) -> None:
    assert run("example_metadata_tool.py", environment) == [
        "user:  I am vegetarian.",
        "agent: I noted that you are vegetarian.",
        "user:  Set my plan to gold.",
        "agent: I cannot change your plan.",
        "the tool said: Metadata updated: preferences.diet.",
        "the tool said: Error: the key 'plan' is not one of preferences",
        "stored: {'plan': 'silver', 'preferences': {'diet': 'vegetarian'}}",
    ]


def test_metadata_hook(environment: dict[str, str]) -> None:
    assert run("example_metadata_hook.py", environment) == [
        "hook: update {'metadata': {'customer': 'Ada'}}",
        "hook: update {'metadata': {'topic': 'invoices'}}",
        "agent: This conversation is about invoices.",
        "refused: card numbers are not stored",
        "hook: get",
        "stored: {'customer': 'Ada', 'topic': 'invoices'}",
    ]


def test_feedback_hook(environment: dict[str, str]) -> None:
    assert run("example_feedback_hook.py", environment) == [
        "agent: Next Monday.",
        "alarm: bad feedback: It did not arrive.",
        "stored: up web ",
        "stored: down web It did not arrive.",
    ]


def test_aws_hooks(environment: dict[str, str]) -> None:
    lines = run("example_aws_hooks.py", environment)
    assert lines == [
        "agent: Your refund is on its way.",
        "notifications: 2 delivered, 0 failed",
        r"SNS: '[negative] on session aws-#', 'Session: aws-#\n\nToo slow.'",
        "SQS: metadata_update, update {'status': 'solved'}",
    ]


def test_multi_agent(environment: dict[str, str]) -> None:
    assert run("example_multi_agent.py", environment) == [
        "A first process:",
        "  researcher begins",
        "  writer begins",
        "It ended with SIGKILL. A second process:",
        "  writer begins",
        "  editor begins",
        "  result: MongoDB stores documents.",
    ]


def test_guardrail_audit(environment: dict[str, str]) -> None:
    assert run("example_guardrail_audit.py", environment) == [
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


def test_sync_script(environment: dict[str, str]) -> None:
    assert run("example_sync_script.py", environment, "--session-id", "diary", "My name is Ada.") == [
        "session diary, restored 0 messages",
        "user:  My name is Ada.",
        "agent: Hello! I have been sent 1 message.",
        "messages: 2",
        "tokens: 11",
    ]
    assert run("example_sync_script.py", environment, "--session-id", "diary", "What is my name?")[:3] == [
        "session diary, restored 2 messages",
        "user:  What is my name?",
        "agent: Your name is Ada.",
    ]


def test_the_sync_script_continues_where_its_last_run_ended(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in ("example_sync_script.py", "offline.py", "scripted_model.py"):
        shutil.copy(EXAMPLES / name, copies)
    environment = {name: value for name, value in os.environ.items() if name != "MONGODB_URI"}

    def lines() -> list[str]:
        command = interpreter.python("copies/example_sync_script.py", "What is my name?", "My name is Ada.")
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=True
        ).stdout.splitlines()

    first, second = lines(), lines()
    assert first[0] == "session script, restored 0 messages"
    assert first[2] == "agent: I do not know your name yet."
    assert second[0] == "session script, restored 4 messages"
    assert second[2] == "agent: Your name is Ada."
    assert "messages: 8" in second


@contextmanager
def serving(name: str, environment: dict[str, str]) -> Iterator[str]:
    """Run an example that is a server on a free port, yield its address, and end it as Ctrl+C does."""
    process = interpreter.start(EXAMPLES / name, "--port", 0, env=environment)
    said = ""
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"running on (http://[\d.:]+)", line):
                yield found[1]
                break
    finally:
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[1]
    assert process.returncode in (0, -signal.SIGINT), said
    assert "Application shutdown complete." in said
    assert "Traceback" not in said


def curl(line: str, address: str) -> httpx.Response:
    """Send what a line of curl would, to another address."""
    arguments = shlex.split(line.replace("http://127.0.0.1:8000", address))
    body = json.loads(arguments[arguments.index("--json") + 1]) if "--json" in arguments else None
    url = next(argument for argument in arguments if argument.startswith("http"))
    return httpx.request("GET" if body is None else "POST", url, json=body, timeout=60)


def test_fastapi(environment: dict[str, str]) -> None:
    lines = re.findall(r"^    (curl .*)$", (EXAMPLES / "example_fastapi.py").read_text(), re.MULTILINE)
    with serving("example_fastapi.py", environment) as address:
        answers = [curl(line, address) for line in lines]
        bad = curl("curl http://127.0.0.1:8000/sessions/a%00b", address)
        unknown = [
            curl("curl http://127.0.0.1:8000/sessions/unknown", address),
            curl("""curl http://127.0.0.1:8000/sessions/unknown/feedback --json '{"rating": "up"}'""", address),
            curl("curl http://127.0.0.1:8000/sessions/unknown", address),
        ]
    with pymongo.MongoClient(environment["MONGODB_URI"]) as client:
        assert client.get_default_database()["agent_sessions"].distinct("_id") == ["ada-1"]
    assert {(answer.status_code, answer.json()["detail"]) for answer in unknown} == {
        (404, "the session does not exist")
    }
    assert [answer.status_code for answer in answers] == [200, 200, 204, 200, 200]
    assert answers[0].json() == {"answer": "Hello! I have been sent 1 message."}
    assert answers[1].text == "Your name is Ada."
    assert answers[3].json()["usage"]["invocations"] == 2
    assert [each["rating"] for each in answers[3].json()["feedbacks"]] == ["up"]
    assert answers[4].json() == {"status": "ok"}
    assert (bad.status_code, bad.json()) == (422, {"detail": "session_id must not hold a NUL character"})


def test_a_real_model_by_one_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    model = make_model("bedrock:eu.amazon.nova-lite-v1:0", ["scripted"], guardrail_id="g")
    assert isinstance(model, BedrockModel)
    assert model.get_config()["model_id"] == "eu.amazon.nova-lite-v1:0"
    assert model.get_config()["guardrail_id"] == "g"


@pytest.mark.parametrize("name", ["hal:9000", "bedrock", "bedrock:"])
def test_an_unknown_model_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        option_parser("").parse_args(["--model", name])
    assert (
        "argument --model: not PROVIDER:MODEL_ID with a provider of bedrock, openai, anthropic"
        in capsys.readouterr().err
    )
