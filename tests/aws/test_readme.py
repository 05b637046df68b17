"""What the README says of AWS, run as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from arrivals import Queue
from documented import README, Program, uri_of


def test_aws_notifications(
    server: str, database: str, stored: Any, moto: str, sqs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    queue, subscriber = Queue(sqs, "support"), Queue(sqs, "subscriber")
    sns = boto3.client("sns")
    topic = sns.create_topic(Name="feedback")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=subscriber.arn)
    sns.close()
    shown = Program(README, uri_of(server, database), tmp_path, monkeypatch).run_block(3)
    assert shown["stats"]["failed"] == 0
    [changed], [told] = queue.arrived(), subscriber.arrived()
    assert changed.metadata == {"status": "solved"}
    assert told.json["Subject"] == "[negative] on session ada-1"
    assert told.json["Message"] == "Session: ada-1\n\nToo slow"
    assert stored.find_one({"_id": "ada-1"})["metadata"] == {"status": "solved", "plan": "gold"}
