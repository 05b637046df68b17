"""Queues and topics of a test, and what arrived in them."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

MOST_AT_ONCE = 10
"""How many messages SQS gives out at a time."""


@dataclass
class Message:
    """What arrived in a queue."""

    body: str
    attributes: dict[str, str]
    system: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def metadata(self) -> Any:
        return self.json["metadata"]


class Queue:
    """A queue and what arrives in it."""

    def __init__(self, client: Any, name: str, **attributes: str) -> None:
        self._client = client
        self.url: str = client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]

    @property
    def arn(self) -> str:
        asked = self._client.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])
        return str(asked["Attributes"]["QueueArn"])

    def arrived(self) -> list[Message]:
        """Return, and take out, what is in the queue."""
        messages: list[Message] = []
        while True:
            answer = self._client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=MOST_AT_ONCE,
                AttributeNames=["All"],
                MessageAttributeNames=["All"],
            )
            received = answer.get("Messages", [])
            for message in received:
                attributes = message.get("MessageAttributes", {})
                told = {name: value["StringValue"] for name, value in attributes.items()}
                messages.append(Message(message["Body"], told, message["Attributes"]))
            if received:
                entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(received)]
                self._client.delete_message_batch(QueueUrl=self.url, Entries=entries)
            if len(received) < MOST_AT_ONCE:
                return messages


@dataclass
class Topic:
    """A topic, and the queue of its subscriber."""

    arn: str
    queue: Queue

    def arrived(self) -> list[dict[str, Any]]:
        """Return, and take out, what the subscriber was notified of."""
        return [message.json for message in self.queue.arrived()]


class Topics:
    """Makes topics."""

    def __init__(self, sns: Any, sqs: Any) -> None:
        self._sns, self._sqs = sns, sqs
        self._made: dict[str, Topic] = {}

    def empty(self, name: str) -> Topic:
        """Return the topic of a name, which is made once, with an empty queue."""
        if name in self._made:
            self._made[name].arrived()
        else:
            self._made[name] = self.new()
        return self._made[name]

    def new(self, suffix: str = "") -> Topic:
        fifo = {"FifoTopic": "true"} if suffix == ".fifo" else {}
        name = uuid.uuid4().hex + suffix
        arn = self._sns.create_topic(Name=name, Attributes=fifo)["TopicArn"]
        queue = Queue(self._sqs, name, **({"FifoQueue": "true"} if fifo else {}))
        self._sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=queue.arn)
        return Topic(arn, queue)
