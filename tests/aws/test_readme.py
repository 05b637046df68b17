"""What the README says of AWS, run as it stands there."""

from __future__ import annotations

from typing import Any

import boto3
import pytest

from arrivals import Queue
from test_examples import BLOCKS, run


def test_aws_notifications(
    server: str, database: str, stored: Any, moto: str, sqs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    queue, subscriber = Queue(sqs, "support"), Queue(sqs, "subscriber")
    sns = boto3.client("sns")
    topic = sns.create_topic(Name="feedback")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=subscriber.arn)
    sns.close()
    shown = run(BLOCKS[3], server, database)
    assert shown["stats"]["failed"] == 0
    [changed], [told] = queue.arrived(), subscriber.arrived()
    assert changed.metadata == {"status": "solved"}
    assert told.json["Subject"] == "[negative] on session ada-1"
    assert told.json["Message"] == "Session: ada-1\n\nToo slow"
    assert stored.find_one({"_id": "ada-1"})["metadata"] == {"status": "solved", "plan": "gold"}
