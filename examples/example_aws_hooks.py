"""Feedback is published to Amazon SNS, and metadata changes are sent to Amazon SQS, in the background.

install: pip install 'mongodb-session-manager[aws,embedded]' 'moto[server]'
run:     python example_aws_hooks.py
expect:  An agent changes a status, and its answer gets a bad rating. Both notifications are printed as they arrived.

A moto server stands in for AWS. To use AWS with your credentials, pass --topic-arn and --queue-url. To use your own
MongoDB server, set the environment variable MONGODB_URI.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from strands import Agent

from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
    create_feedback_sns_hook,
    create_metadata_sqs_hook,
)
from mongodb_session_manager.demo import ScriptedModel, demo_server

# In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), OllamaModel(...)
MODEL = ScriptedModel(
    [
        {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"status": "solved"}}},
        "Your refund is on its way.",
    ]
)


@dataclass
class Targets:
    """The topic and the queue, and queues to read the notifications from."""

    topic_arn: str
    queue_url: str
    inboxes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def moto() -> Iterator[Targets]:
    """Run a stand-in for AWS with a topic, a subscriber of the topic, and a queue."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "moto",
        "AWS_SECRET_ACCESS_KEY": "moto",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    sqs = boto3.resource("sqs")
    queue, subscriber = sqs.create_queue(QueueName="metadata"), sqs.create_queue(QueueName="subscriber")
    topic = boto3.resource("sns").create_topic(Name="feedback")
    topic.subscribe(Protocol="sqs", Endpoint=subscriber.attributes["QueueArn"])
    try:
        yield Targets(topic.arn, queue.url, {"SNS": subscriber, "SQS": queue})
    finally:
        server.stop()


def talk(targets: Targets, connection_string: str) -> None:
    """Let an agent change the status, and rate its answer."""
    feedback_hook = create_feedback_sns_hook(
        targets.topic_arn, targets.topic_arn, "none", subject_prefix_bad="[{rating}] "
    )
    metadata_hook = create_metadata_sqs_hook(targets.queue_url, metadata_fields=["status"])
    with MongoDBSessionManagerFactory(
        connection_string, feedback_hook=feedback_hook, metadata_hook=metadata_hook
    ) as factory:
        with factory.create_session_manager(f"aws-{uuid4().hex[:8]}") as session:
            session.update_metadata({"plan": "gold"})  # not one of the metadata_fields: no notification
            agent = Agent(
                model=MODEL, tools=[session.get_metadata_tool()], session_manager=session, callback_handler=None
            )
            print("agent:", str(agent("I want a refund. Set the status in the metadata to solved.")).strip())
            session.add_feedback({"rating": "down", "comment": "Too slow."})
        # Closing the session waited up to five seconds for its notifications.
        stats = factory.get_notification_stats()
        print(f"notifications: {stats['delivered']} delivered, {stats['failed']} failed")


def show(targets: Targets) -> None:
    """Print the notifications that arrived."""
    for name, queue in targets.inboxes.items():
        for message in queue.receive_messages(MaxNumberOfMessages=10):
            body = json.loads(message.body)
            if name == "SNS":
                print(f"SNS: {body['Subject']!r}, {body['Message']!r}")
            else:
                print(f"SQS: {body['event']}, {body['operation']} {body['metadata']}")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic-arn", help="an SNS topic")
    parser.add_argument("--queue-url", help="an SQS queue")
    options = parser.parse_args()
    if options.topic_arn and options.queue_url:
        talk(Targets(options.topic_arn, options.queue_url), demo_server())
    else:
        with moto() as targets:
            talk(targets, demo_server())
            show(targets)


if __name__ == "__main__":
    main()
