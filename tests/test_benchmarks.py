"""`python -m benchmarks` measures, writes what it found, and can read it again. The numbers are for people to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import interpreter
from benchmarks.__main__ import main


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    code = "import runpy; runpy.run_module('benchmarks', run_name='__main__')"
    outputs = ["--json", directory / "run.json", "--plots", directory]
    shown, _ = interpreter.run(code, "--quick", "commands", "streams", *outputs, timeout=120)
    assert shown == ""
    return directory


def test_results_hold_the_machine_and_what_was_measured(results: Path) -> None:
    document = json.loads((results / "run.json").read_text())
    assert document["quick"] is True
    assert {"processor", "cores", "python", "mongod", "motor", "pymongo", "strands-agents"} <= document[
        "machine"
    ].keys()
    assert document["measures"].keys() == {"commands", "streams"}


def test_commands_are_counted(results: Path) -> None:
    commands = json.loads((results / "run.json").read_text())["measures"]["commands"]
    counted = {row["case"]: (row["save_on=message"], row["save_on=invocation"]) for row in commands["rows"]}
    assert counted == {
        "new session, one turn, explicit sync": (3, 2),
        "resumed session, one turn, explicit sync": (3, 2),
        "new session, one turn with a tool call, explicit sync": (5, 2),
        "resumed session, one turn with a tool call, explicit sync": (5, 2),
        "one more turn of a live agent, explicit sync": (2, 1),
        "a manager from a factory, opened and closed": (1, 1),
    }
    assert all(budget["kept"] for budget in commands["budgets"])


def test_ratios_are_of_the_same_run(results: Path) -> None:
    rows = json.loads((results / "run.json").read_text())["measures"]["streams"]["rows"]
    none, library = {row["contender"]: row for row in rows}.values()
    assert none["× none"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    ratio = library["× none"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert ratio["high"] <= library["turns/s"]["high"] / none["turns/s"]["low"]
    assert library["processor/turn, ms"]["low"] > 0


def test_results_are_drawn(results: Path) -> None:
    assert {path.name for path in results.glob("*.svg")} == {"commands.svg", "streams.svg"}
    assert "library" in (results / "streams.svg").read_text()


def test_results_become_markdown(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown", str(results / "run.json")]) == 0
    shown = capsys.readouterr().out
    assert "| new session, one turn, explicit sync | 3 | 2 | 19 |" in shown
    assert "event-loop lag, p99 | ≤ 120 ms |" in shown


def test_an_unknown_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "speed"])
    assert "no such measure: speed" in capsys.readouterr().err
