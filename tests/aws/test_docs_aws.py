"""Pages of the documentation that need AWS, run beside a server that does what AWS does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
from strands.session import S3SessionManager

from arrivals import Queue
from documented import PAGES, Program, uri_of
from support import agent


@pytest.fixture
def program(server: str, database: str, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    return lambda page: Program(PAGES / page, uri_of(server, database), tmp_path, monkeypatch)


def test_the_page_of_aws(program: Any, sqs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    queue, subscriber = Queue(sqs, "support"), Queue(sqs, "subscriber")
    sns = boto3.client("sns")
    topic = sns.create_topic(Name="feedback")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=subscriber.arn)
    sns.close()
    page = program("user-guide/aws.md")
    page.run(capsys)
    assert page.names["topic"] == topic
    [changed], [told] = queue.arrived(), subscriber.arrived()
    assert changed.metadata == {"status": "solved"}
    assert told.json["Subject"] == "[negative] on session ada-1"
    assert told.json["Message"] == "Session: ada-1\n\nToo slow"


def test_the_page_of_other_managers(program: Any, moto: str, capsys: pytest.CaptureFixture[str]) -> None:
    s3 = boto3.client("s3", endpoint_url=moto)
    s3.create_bucket(Bucket="sessions", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s3.close()
    page = program("migrating/from-strands.md")
    agent(S3SessionManager("bob-1", bucket="sessions"), "Hello.", agent_id="desk")("Hi.")
    page.run(capsys)
