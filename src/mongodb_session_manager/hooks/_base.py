"""The base class of the AWS hooks, and the checks of their arguments."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from .._io.requested_fields import StoredFields, requesting
from .._notifications.notification import OnError
from .._notifications.notify import submit
from ..errors import ConfigurationError
from ._aws import POLICY, AwsClient, shared_client

if TYPE_CHECKING:
    from ._aws import Config, Session

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class AwsHook(ABC):
    """A hook that performs the operation and then notifies AWS in the background.

    A failure of the notification never reaches the caller.
    """

    actions: ClassVar[frozenset[str]]
    """The actions that send a notification."""

    stored_fields: ClassVar[tuple[str, ...]] = ()
    """The fields of the stored metadata that the notification needs."""

    waits_as_original_does: ClassVar[bool] = True
    """The hook is synchronous or asynchronous like its `original_func`."""

    def __init__(
        self,
        *,
        endpoint_url: str | None,
        aws_session: Session | None,
        config: Config | None,
        on_error: OnError | None,
    ) -> None:
        if on_error is not None and not callable(on_error):
            raise ConfigurationError(f"on_error must be a function, got {type(on_error).__name__}")
        self._on_error = on_error
        self._options: dict[str, Any] = {"endpoint_url": endpoint_url, "aws_session": aws_session, "config": config}

    def _client(self, service: str, region_name: str | None) -> AwsClient:
        return shared_client(service, region_name=region_name, **self._options)

    def __call__(self, original_func: Callable[..., Any], action: str, session_id: str, **argument: Any) -> Any:
        """Perform the operation, and notify if it succeeded.

        Returns:
            The result of `original_func`, or an awaitable of it if `original_func` returns an awaitable.
        """
        if action not in self.actions:
            return original_func(*argument.values())
        stored = StoredFields(self.stored_fields)
        with requesting(stored):
            result = original_func(*argument.values())
        if inspect.isawaitable(result):
            return self._awaited(result, action, session_id, argument, stored)
        self._notify_safely(action, session_id, argument, stored)
        return result

    async def _awaited(
        self, result: Awaitable[Any], action: str, session_id: str, argument: dict[str, Any], stored: StoredFields
    ) -> Any:
        with requesting(stored):
            outcome = await result
        self._notify_safely(action, session_id, argument, stored)
        return outcome

    def _notify_safely(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        try:
            self._notify(action, session_id, argument, stored)
        except Exception as error:  # the operation succeeded, so the caller gets its result
            logger.error("session_id=<%r>, error=<%s> | no notification created", session_id, type(error).__name__)

    @abstractmethod
    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        """Submit the notification of an operation that succeeded."""

    def _submit(self, name: str, session_id: str, deliver: Callable[[], Awaitable[object]], body: str) -> None:
        submit(name, session_id, deliver, POLICY, self._on_error, body)


def updated(action: str, argument: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a metadata operation changed by key, or `None` for a deleted key."""
    return dict(argument["metadata"]) if action == "update" else dict.fromkeys(argument["keys"])


def checked_fields(fields: Any) -> tuple[str, ...] | None:
    if fields is None:
        return None
    if isinstance(fields, str) or not all(isinstance(field, str) for field in fields):
        raise ConfigurationError("metadata_fields must be a list of field names")
    if not fields:
        logger.warning("metadata_fields=<[]> | an empty list sends no notification; None sends all fields")
    return tuple(fields)


def checked_text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name} must be a non-empty str, got {type(value).__name__}")
    return value


def with_parameters_of(made: Callable[P, T]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Copy the signature of `made` to a function that forwards its arguments."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        function.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
        return function

    return decorate
