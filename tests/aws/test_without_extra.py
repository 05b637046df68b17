"""The package without its extras: the import of what they bring is refused as an environment without it would.

boto3 and botocore stay, because Strands needs them itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import interpreter
import mongodb_session_manager

AWS_NAMES = [
    "FeedbackSNSHook",
    "MetadataSQSHook",
    "MetadataWebSocketHook",
    "create_feedback_sns_hook",
    "create_metadata_sqs_hook",
    "create_metadata_websocket_hook",
]

WITHOUT = f"""
import sys

EXTRAS = ("aioboto3", "aiobotocore", "aiohttp", "fastapi")

def forget(*packages):
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]

forget("mongodb_session_manager", *EXTRAS)  # this process is a fork of one that has imported them
import mongodb_session_manager.hooks
assert not [name for name in sys.modules if name.partition(".")[0] in EXTRAS]
assert "mongodb_session_manager.demo" not in sys.modules
forget("mongodb_session_manager")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())

import mongodb_session_manager as package
from mongodb_session_manager import *
assert not package.is_feedback_sns_hook_available()
assert not package.is_metadata_sqs_hook_available()
assert not package.is_metadata_websocket_hook_available()
assert MongoDBSessionManager and notify_later and chain_hooks
from mongodb_session_manager.hooks import *
assert package.hooks.__all__ == []
print(*[name for name in package.__all__ if "Hook" in name or name.startswith("create")])

for name in {AWS_NAMES}:
    for touch in (
        lambda: getattr(package, name),
        lambda: exec(f"from mongodb_session_manager import {{name}}"),
        lambda: exec("from mongodb_session_manager.hooks.sns import FeedbackSNSHook"),
        lambda: exec(f"from mongodb_session_manager.hooks import {{name.replace('feedback_sns', 'feedback')}}"),
    ):
        try:
            touch()
        except package.MissingExtraError as error:
            assert isinstance(error, ImportError) and isinstance(error, package.MongoDBSessionError)
            assert "pip install 'mongodb-session-manager[aws]'" in str(error)
            print(name)

try:
    import mongodb_session_manager.fastapi
except ImportError as error:
    print(error)
"""


def test_without_them_the_rest_of_the_package_is_there_and_an_error_says_what_to_install() -> None:
    shown, errors = interpreter.run(WITHOUT)
    assert errors == ""
    assert shown.splitlines() == [
        "Hook create_mongodb_session_manager create_mongodb_session_manager_async",
        *(name for name in AWS_NAMES for _ in range(4)),
        "mongodb_session_manager.fastapi needs FastAPI: pip install 'mongodb-session-manager[fastapi]'",
    ]


def test_with_the_extra() -> None:
    package: Any = mongodb_session_manager
    assert package.is_feedback_sns_hook_available() is True
    assert package.is_metadata_sqs_hook_available() is True
    assert package.is_metadata_websocket_hook_available() is True
    assert {*AWS_NAMES} <= {*package.__all__} & {*dir(package)}
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = package.nothing_of_that_name


def test_the_functions_take_what_the_contract_says() -> None:
    package: Any = mongodb_session_manager
    everywhere = ["region_name", "endpoint_url", "aws_session", "config"]
    for name, arguments in {
        "create_feedback_sns_hook": [
            *["topic_arn_good", "topic_arn_bad", "topic_arn_neutral"],
            *["subject_prefix_good", "subject_prefix_bad", "subject_prefix_neutral"],
            *["body_prefix_good", "body_prefix_bad", "body_prefix_neutral"],
        ],
        "create_metadata_sqs_hook": ["queue_url", "metadata_fields"],
        "create_metadata_websocket_hook": ["api_gateway_endpoint", "metadata_fields", "region"],
    }.items():
        parameters = list(inspect.signature(getattr(package, name)).parameters)
        assert parameters[: len(arguments) + 4] == arguments + everywhere
