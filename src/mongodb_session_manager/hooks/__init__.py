"""Hooks that send a session's metadata and feedback to AWS.

The modules `sns`, `sqs` and `websocket` need the extra `aws`; without it, importing a name raises `MissingExtraError`.
The names here are those of versions 0.5 to 0.9; new code imports from the root of the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import typing

if typing.TYPE_CHECKING:
    from .sns import FeedbackSNSHook
    from .sns import create_feedback_sns_hook as create_feedback_hook
    from .sqs import MetadataSQSHook, create_metadata_sqs_hook
    from .websocket import MetadataWebSocketHook, create_metadata_websocket_hook

__all__ = [
    "FeedbackSNSHook",
    "MetadataSQSHook",
    "MetadataWebSocketHook",
    "create_feedback_hook",
    "create_metadata_sqs_hook",
    "create_metadata_websocket_hook",
]

_ORIGINS = {
    "FeedbackSNSHook": ("sns", "FeedbackSNSHook"),
    "MetadataSQSHook": ("sqs", "MetadataSQSHook"),
    "MetadataWebSocketHook": ("websocket", "MetadataWebSocketHook"),
    "create_feedback_hook": ("sns", "create_feedback_sns_hook"),
    "create_metadata_sqs_hook": ("sqs", "create_metadata_sqs_hook"),
    "create_metadata_websocket_hook": ("websocket", "create_metadata_websocket_hook"),
}


def _has_extra() -> bool:
    """Return whether the extra `aws` is installed, without importing it."""
    try:
        return importlib.util.find_spec("aioboto3") is not None
    except ImportError:
        return False


if not _has_extra():  # so that `from mongodb_session_manager.hooks import *` works
    __all__ = []


def __getattr__(name: str) -> typing.Any:
    """Import an AWS hook on first access."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _ORIGINS[name]
    return getattr(importlib.import_module(f".{module}", __name__), original)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ORIGINS})
