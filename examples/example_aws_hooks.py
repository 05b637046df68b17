"""Feedback goes to Amazon SNS and changes of metadata to Amazon SQS, in the background.

install: pip install 'mongodb-session-manager[aws,embedded]' 'moto[server]'
run:     python examples/example_aws_hooks.py
expect:  an agent that notes a status, a bad rating of its answer, and both notifications as they arrived

A moto server stands in for AWS; --topic-arn and --queue-url name a real topic and queue, to which your credentials may
write. --model and MONGODB_URI take a real model and a real server; see offline.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from strands import Agent

from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
    create_feedback_sns_hook,
    create_metadata_sqs_hook,
)
from offline import make_model, mongodb, new_session_id, option_parser

SCRIPT = [
    {"tool": "manage_metadata", "input": {"action": "set", "metadata": {"status": "solved"}}},
    "Your refund is on its way.",
]


@dataclass
class Targets:
    """Where notifications go, and what can be read of them there."""

    topic_arn: str
    queue_url: str
    inboxes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def moto() -> Iterator[Targets]:
    """Run a server that does what AWS does, with a topic, its subscriber and a queue."""
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


def talk(targets: Targets, model_name: str) -> None:
    """Have an agent note a status, and rate it; the calls return when MongoDB has it, the notifications follow."""
    with MongoDBSessionManagerFactory(
        feedback_hook=create_feedback_sns_hook(
            targets.topic_arn, targets.topic_arn, "none", subject_prefix_bad="[{rating}] "
        ),
        metadata_hook=create_metadata_sqs_hook(targets.queue_url, metadata_fields=["status"]),
    ) as factory:
        with factory.create_session_manager(new_session_id("aws")) as session:
            session.update_metadata({"plan": "gold"})  # not among the metadata_fields: it stays here
            agent = Agent(
                model=make_model(model_name, SCRIPT),
                tools=[session.get_metadata_tool()],
                session_manager=session,
                callback_handler=None,
            )
            print("agent:", str(agent("I want a refund. Set the status in the metadata to solved.")).strip())
            session.add_feedback({"rating": "down", "comment": "Too slow."})
        # Closing the session waited for its notifications, at most five seconds.
        stats = factory.get_notification_stats()
        print(f"notifications: {stats['delivered']} delivered, {stats['failed']} failed")


def show(targets: Targets) -> None:
    """Print what arrived."""
    for name, queue in targets.inboxes.items():
        for message in queue.receive_messages(MaxNumberOfMessages=10):
            body = json.loads(message.body)
            if name == "SNS":
                print(f"SNS: {body['Subject']!r}, {body['Message']!r}")
            else:
                print(f"SQS: {body['event']}, {body['operation']} {body['metadata']}")


def main() -> None:
    """Run the example."""
    parser = option_parser(__doc__)
    parser.add_argument("--topic-arn", help="a real SNS topic")
    parser.add_argument("--queue-url", help="a real SQS queue")
    options = parser.parse_args()
    with mongodb():
        if options.topic_arn and options.queue_url:
            talk(Targets(options.topic_arn, options.queue_url), options.model)
        else:
            with moto() as targets:
                talk(targets, options.model)
                show(targets)


if __name__ == "__main__":
    main()
