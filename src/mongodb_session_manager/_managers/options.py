"""The options of managers and factories: their types, their defaults, and the connection they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, Literal, Self, cast, get_args

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES, checked_inline_bytes
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES
from .._format.labels import checked_owner, checked_tags, checked_title
from .._format.retention import MAX_SECONDS, checked_ttl
from .._io import drivers
from .._io.connection import Connection
from .._io.options import ClientOptions, ContentOptions
from .._io.settings import Settings, unexpected_option
from .._repository.async_repository import SharedRepository
from .._store.lease import Lease
from .._store.store import SessionStore
from ..errors import ConfigurationError
from .user_hooks import Hook, checked_hook

SaveOn = Literal["message", "overlap", "invocation"]
"""When the messages of a turn are stored.

`"message"` stores each message before the agent continues, `"overlap"` while the model is called, and `"invocation"`
stores all messages of a turn at its end.
"""

OnBusy = Literal["conflict", "wait", "refuse"]
"""The behaviour of a manager while another manager has its turn in the session.

`"conflict"` does not check for a turn: the later writer gets `SessionConflictError`. `"wait"` waits for the end of the
turn, and `"refuse"` raises `SessionBusyError`.
"""


class SessionOptions(ContentOptions, total=False):
    """The options of a session: those of `ContentOptions`, the hooks, and when messages are stored.

    Attributes:
        title: The title of a session that is created; `update_session` changes it. At most 1,000 characters.
        tags: The tags of a session that is created; `update_session` changes them. At most 100, of at most 200
            characters each.
        must_exist: Whether opening raises `SessionNotFoundError` if the session does not exist, instead of creating it;
            default `False`.
        metadata_hook: Called around every use of metadata, `def` or `async def`.
        metadataHook: Another spelling of `metadata_hook`.
        feedback_hook: Called around every new feedback, `def` or `async def`.
        feedbackHook: Another spelling of `feedback_hook`.
        save_on: `"message"`, the default, stores each message before the agent continues; `"overlap"` stores user
            messages and tool results while the model is called; `"invocation"` stores all messages of a turn at its
            end.
        on_busy: The behaviour while another manager has its turn in the session. `"conflict"`, the default: the later
            writer gets `SessionConflictError`. `"wait"`: opening waits for the end of the turn. `"refuse"`: opening
            raises `SessionBusyError`.
        busy_timeout: The longest wait, in seconds, until opening raises `SessionBusyError`; default 30.
        lease: Seconds after which a manager whose process was killed or is frozen can lose its turn; default 30. A
            running manager renews its lease.
    """

    title: str | None
    tags: Sequence[str] | None
    must_exist: bool | None
    metadata_hook: Hook | None
    metadataHook: Hook | None
    feedback_hook: Hook | None
    feedbackHook: Hook | None
    save_on: SaveOn | None
    on_busy: OnBusy | None
    busy_timeout: float | None
    lease: float | None


class ManagerOptions(SessionOptions, ClientOptions, total=False):
    """The options of managers and factories: those of `SessionOptions`, of PyMongo's client, and the client itself.

    Attributes:
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
            It replaces the connection string and the client options.
    """

    client: drivers.Client | None


_SPELLINGS = {"metadataHook": "metadata_hook", "feedbackHook": "feedback_hook"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The values of `SessionOptions`, with the names of database and collection."""

    database_name: str | None = None
    collection_name: str = "agent_sessions"
    application_name: str | None = None
    owner: str | None = None
    title: str | None = None
    tags: Sequence[str] | None = None
    must_exist: bool = False
    metadata_fields: Sequence[str] | None = None
    metadata_hook: Hook | None = None
    feedback_hook: Hook | None = None
    save_on: SaveOn = "message"
    on_busy: OnBusy = "conflict"
    busy_timeout: float = 30.0
    lease: float = 30.0
    max_inline_attachment_bytes: int = MAX_INLINE_ATTACHMENT_BYTES
    max_embedded_messages: int = MAX_EMBEDDED_MESSAGES
    max_embedded_bytes: int = MAX_EMBEDDED_BYTES
    session_ttl: timedelta | None = None

    def __post_init__(self) -> None:
        if self.owner is not None:
            object.__setattr__(self, "owner", checked_owner(self.owner))
        if self.title is not None:
            object.__setattr__(self, "title", checked_title(self.title))
        if self.tags is not None:
            object.__setattr__(self, "tags", tuple(checked_tags(self.tags)))
        if not isinstance(self.must_exist, bool):
            raise ConfigurationError(f"must_exist must be a bool, got {self.must_exist!r}")
        checked_hook(self.metadata_hook, "metadata_hook")
        checked_hook(self.feedback_hook, "feedback_hook")
        _check_choice("save_on", self.save_on, get_args(SaveOn))
        _check_choice("on_busy", self.on_busy, get_args(OnBusy))
        _check_seconds("busy_timeout", self.busy_timeout, can_be_zero=True)
        _check_seconds("lease", self.lease)
        checked_inline_bytes(self.max_inline_attachment_bytes)
        checked_ttl(self.session_ttl)

    def hook_for(self, action: str) -> Hook | None:
        return self.feedback_hook if action == "add" else self.metadata_hook

    def replaced(self, given: Mapping[str, Any]) -> Self:
        """Return these options with some replaced; an option that is `None` is not given.

        Raises:
            ConfigurationError: An option is unknown, invalid, or passed in both spellings.
            InvalidArgumentError: The owner, the title or the tags are invalid.
        """
        known = [option.name for option in fields(self)]
        options: dict[str, Any] = {}
        for name, value in given.items():
            option = _SPELLINGS.get(name, name)
            if option not in known and (value is not None or option not in OPTIONS):
                raise unexpected_option(name, known)
            if value is None:
                continue
            if option in options:
                raise ConfigurationError(f"{option} is passed in both spellings")
            options[option] = value
        return replace(self, **options)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ConfigurationError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def _check_seconds(name: str, value: object, *, can_be_zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < cast(float, value) <= MAX_SECONDS or (can_be_zero and value == 0)):
        bound = ">= 0" if can_be_zero else "> 0"
        raise ConfigurationError(f"{name} must be a number of seconds {bound} and at most {MAX_SECONDS}, got {value!r}")


OPTIONS = ("connection_string", "client", *Options.__dataclass_fields__)
"""The options of managers and factories, without those of the driver."""


@dataclass(frozen=True)
class Configuration:
    """The collaborators and options of a manager or factory."""

    options: Options
    connection: Connection
    owns_connection: bool = True

    @classmethod
    def of(
        cls,
        connection_string: str | None,
        database_name: str | None,
        collection_name: str | None,
        given: ManagerOptions,
    ) -> Configuration:
        """Return the configuration that the arguments of a constructor describe; nothing is connected yet.

        Raises:
            ConfigurationError: An argument is unknown or invalid.
        """
        of_client: dict[str, Any] = dict(given)
        client = of_client.pop("client", None)
        ours = {name: of_client.pop(name) for name in tuple(of_client) if name in OPTIONS or name in _SPELLINGS}
        options = Options().replaced({"database_name": database_name, "collection_name": collection_name, **ours})
        return cls(options, Connection(Settings.checked(connection_string, client, of_client, OPTIONS)))

    def shared(self, overrides: Mapping[str, Any]) -> Configuration:
        """Return the configuration of a manager that uses this connection and does not close it.

        Raises:
            ConfigurationError: An override is unknown or invalid.
        """
        return Configuration(self.options.replaced(overrides), self.connection, owns_connection=False)

    def repository(self) -> SharedRepository:
        """Return a repository on the connection.

        Raises:
            ConfigurationError: An option is invalid.
        """
        options = self.options
        store = SessionStore(
            self.connection,
            options.database_name,
            options.collection_name,
            application_name=options.application_name,
            owner=options.owner,
            metadata_fields=options.metadata_fields,
            max_inline_attachment_bytes=options.max_inline_attachment_bytes,
            max_embedded_messages=options.max_embedded_messages,
            max_embedded_bytes=options.max_embedded_bytes,
            session_ttl=options.session_ttl,
        )
        return SharedRepository(store)

    def lease(self, repository: SharedRepository, session_id: str) -> Lease | None:
        """Return the lease of a manager; `None` with `on_busy="conflict"`."""
        options = self.options
        if options.on_busy == "conflict":
            return None
        waits = options.on_busy == "wait"
        return Lease(repository._store, session_id, waits, options.busy_timeout, options.lease, options.owner)
