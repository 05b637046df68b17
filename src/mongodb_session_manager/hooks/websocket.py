"""Metadata changes to a WebSocket connection of Amazon API Gateway."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .._io.requested_fields import CONNECTION_ID, StoredFields
from .._notifications.notification import OnError
from ..errors import ConfigurationError, MongoDBSessionError
from ._aws import is_gone
from ._base import AwsHook, checked_fields, checked_text, updated, with_parameters_of
from ._messages import WEBSOCKET_LIMIT, metadata_body, selected

if TYPE_CHECKING:
    from ._aws import Config, Session

logger = logging.getLogger(__name__)

_API_HOST = re.compile(r"https://[^/.]+\.execute-api\.([a-z0-9-]+)\.")


class MetadataWebSocketHook(AwsHook):
    """A metadata hook that posts each update and delete to the session's WebSocket connection, in the background.

    The connection is the stored `metadata.connection_id`; the command that makes the change returns it. The body is the
    JSON that `MetadataSQSHook` sends, without `connection_id`, and with a limit of 128 KiB. A session without a
    connection sends nothing, and so does a change that includes none of `metadata_fields`. Sending to a connection that
    no longer exists is not an error.

    Args:
        api_gateway_endpoint: Like `https://<api>.execute-api.<region>.amazonaws.com/<stage>`, with `https://` or `wss://`.
        metadata_fields: The fields to send; `None` sends all.
        region: The region; `None` uses the one in the endpoint, else the default of the AWS session.
        region_name: The same as `region`, which it overrides.
        endpoint_url: The URL to post to; `None` uses `api_gateway_endpoint`.
        aws_session: The `aioboto3.Session` with the credentials; `None` uses the default credential chain.
        config: A botocore `Config`.
        on_error: Called with a `NotificationEvent` and the exception for each notification that is dropped, on the
            library's event loop. It must return at once.
        remove_gone: Whether to remove `connection_id` from the metadata when its connection no longer exists, unless it
            has been replaced.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    actions = frozenset({"update", "delete"})
    stored_fields = (CONNECTION_ID,)

    def __init__(
        self,
        api_gateway_endpoint: str,
        metadata_fields: Sequence[str] | None = None,
        region: str | None = None,
        *,
        region_name: str | None = None,
        endpoint_url: str | None = None,
        aws_session: Session | None = None,
        config: Config | None = None,
        on_error: OnError | None = None,
        remove_gone: bool = True,
    ) -> None:
        endpoint = _over_http(checked_text(endpoint_url or api_gateway_endpoint, "api_gateway_endpoint"))
        super().__init__(endpoint_url=endpoint, aws_session=aws_session, config=config, on_error=on_error)
        self._fields = checked_fields(metadata_fields)
        self._removes_gone = remove_gone
        named = _API_HOST.match(_over_http(api_gateway_endpoint))
        self._api = self._client("apigatewaymanagementapi", region_name or region or (named[1] if named else None))

    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        connection = stored.values.get(CONNECTION_ID)
        metadata = selected(updated(action, argument), self._fields, hidden=[CONNECTION_ID])
        if not isinstance(connection, str) or not connection or not metadata:
            return
        body = metadata_body(session_id, action, metadata, WEBSOCKET_LIMIT, first="event")
        self._submit("websocket.metadata_update", session_id, partial(self._post, connection, body, stored), body)

    async def _post(self, connection: str, body: str, stored: StoredFields) -> None:
        try:
            await self._api.call("post_to_connection", ConnectionId=connection, Data=body.encode())
        except Exception as error:
            if not is_gone(error):
                raise
            logger.debug("connection_id=<%r> | the WebSocket connection is gone", connection)
            if self._removes_gone and stored.remove is not None:
                await _remove(stored, connection)


async def _remove(stored: StoredFields, connection: str) -> None:
    assert stored.remove is not None
    try:
        await stored.remove(CONNECTION_ID, connection)
    except MongoDBSessionError as error:  # the next notification tries again
        logger.debug("connection_id=<%r>, error=<%s> | the connection id was not removed", connection, error)


def _over_http(endpoint: str) -> str:
    """Return the HTTP URL of an endpoint.

    Raises:
        ConfigurationError: The endpoint is not a URL.
    """
    scheme, separator, rest = endpoint.partition("://")
    over = {"wss": "https", "ws": "http"}.get(scheme.lower(), scheme.lower())
    if not separator or not rest or over not in ("http", "https"):
        raise ConfigurationError("api_gateway_endpoint must be a URL with https:// or wss://")
    return f"{over}://{rest.rstrip('/')}"


@with_parameters_of(MetadataWebSocketHook)
def create_metadata_websocket_hook(*args: Any, **kwargs: Any) -> MetadataWebSocketHook:
    """Return a metadata hook that posts to WebSockets; for the arguments see `MetadataWebSocketHook`."""
    return MetadataWebSocketHook(*args, **kwargs)
