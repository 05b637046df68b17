"""What the AWS hooks share: the operation first, then the notification, and whose clients are open how long."""

from __future__ import annotations

import inspect
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from .._io.asked_fields import StoredFields, asking_for
from .._notifications.notification import OnError
from .._notifications.notify import submit
from ..errors import ConfigurationError
from ._aws import POLICY, AwsService

if TYPE_CHECKING:
    from ._aws import Config, Session

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class AwsHook(ABC):
    """A hook that does the operation and then notifies in the background.

    Nothing that happens to the notification reaches the caller.
    """

    actions: ClassVar[frozenset[str]]
    """The actions it notifies of."""

    stored_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the stored metadata it needs to know after a change."""

    waits_as_original_does: ClassVar[bool] = True
    """The hook is synchronous or asynchronous, as its `original_func` is."""

    def __init__(
        self,
        *,
        endpoint_url: str | None,
        aws_session: Session | None,
        config: Config | None,
        on_error: OnError | None,
    ) -> None:
        if on_error is not None and not callable(on_error):
            raise ConfigurationError(f"on_error must be a function, not {type(on_error).__name__}")
        self._on_error = on_error
        self._how = {"endpoint_url": endpoint_url, "aws_session": aws_session, "config": config}
        self._services: dict[str | None, AwsService] = {}

    def _service(self, name: str, region_name: str | None) -> AwsService:
        if region_name not in self._services:
            self._services[region_name] = AwsService(name, region_name=region_name, **self._how)
        return self._services[region_name]

    def __call__(self, original_func: Callable[..., Any], action: str, session_id: str, **argument: Any) -> Any:
        """Perform the operation, and notify if it succeeded.

        Returns:
            The result of `original_func`, or an awaitable of it if `original_func` returns an awaitable.
        """
        if action not in self.actions:
            return original_func(*argument.values())
        stored = StoredFields(self.stored_fields)
        with asking_for(stored):
            result = original_func(*argument.values())
        if inspect.isawaitable(result):
            return self._finished(result, action, session_id, argument, stored)
        self._tell(action, session_id, argument, stored)
        return result

    async def _finished(
        self, result: Awaitable[Any], action: str, session_id: str, argument: dict[str, Any], stored: StoredFields
    ) -> Any:
        with asking_for(stored):
            outcome = await result
        self._tell(action, session_id, argument, stored)
        return outcome

    def _tell(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        try:
            self._notify(action, session_id, argument, stored)
        except Exception as error:  # the operation succeeded, and that is what its caller is told
            logger.error("session_id=<%r>, error=<%s> | no notification made", session_id, type(error).__name__)

    @abstractmethod
    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        """Submit what is to be told of an operation that succeeded."""

    def _submit(self, name: str, session_id: str, deliver: Callable[[], Awaitable[object]], body: str) -> None:
        submit(name, session_id, deliver, policy=POLICY, on_error=self._on_error, message=body)

    def hold(self, user: object) -> None:
        """Take note of a manager or factory that uses the hook."""
        for service in self._services.values():
            service.hold(user)

    async def let_go(self, user: object) -> None:
        """Take note that one uses it no more; the last one's going closes the client, unless other hooks share it."""
        for service in self._services.values():
            await service.let_go(user)


def calling(service: AwsService, operation: str, **parameters: Any) -> Callable[[], Awaitable[object]]:
    """Return a delivery that calls an operation of a service."""
    return partial(service.call, operation, **parameters)


def identity() -> str:
    """Return what tells an event from every other, through all tries of its delivery."""
    return uuid.uuid4().hex


def updated(action: str, argument: dict[str, Any]) -> dict[str, Any]:
    """Return what a metadata operation changed: values by key, `None` for what was deleted."""
    return dict(argument["metadata"]) if action == "update" else dict.fromkeys(argument["keys"])


def checked_fields(fields: Any) -> tuple[str, ...] | None:
    """Return `metadata_fields`.

    Raises:
        ConfigurationError: It is not a list of field names.
    """
    if fields is None:
        return None
    if isinstance(fields, str) or not all(isinstance(field, str) for field in fields):
        raise ConfigurationError("metadata_fields must be a list of field names")
    if not fields:
        logger.warning("metadata_fields=<[]> | no field may leave, so nothing is sent; None lets all fields leave")
    return tuple(fields)


def checked_text(value: object, name: str) -> str:
    """Return an argument that must be there.

    Raises:
        ConfigurationError: It is not a non-empty str.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name} must be a non-empty str")
    return value


def with_parameters_of(made: Callable[P, T]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function that passes everything on the signature of what it makes."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        function.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
        return function

    return decorate
