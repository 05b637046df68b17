"""Options: what is not given, what is unknown, what cannot be, and connection strings."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.errors import PyMongoError

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    MongoDBConnectionPool,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    initialize_global_factory,
)
from support import CommandLog, agent

SECRET = "hunter2secret"
NOWHERE = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100"

MANAGERS: dict[str, Callable[..., Any]] = {
    "manager": lambda *args, **kwargs: MongoDBSessionManager("s", *args, **kwargs),
    "async manager": lambda *args, **kwargs: AsyncMongoDBSessionManager("s", *args, **kwargs),
    "create": lambda *args, **kwargs: create_mongodb_session_manager("s", *args, **kwargs),
    "create async": lambda *args, **kwargs: asyncio.run(create_mongodb_session_manager_async("s", *args, **kwargs)),
    "factory": MongoDBSessionManagerFactory,
    "global factory": initialize_global_factory,
}
REPOSITORIES: dict[str, Callable[..., Any]] = {
    "repository": MongoDBSessionRepository,
    "async repository": AsyncMongoDBSessionRepository,
}
ENTRANCES = pytest.mark.parametrize(
    "entrance", [*MANAGERS.values(), *REPOSITORIES.values()], ids=[*MANAGERS, *REPOSITORIES]
)
OF_MANAGERS = pytest.mark.parametrize("entrance", MANAGERS.values(), ids=MANAGERS)

NOT_GIVEN: dict[str, Any] = {
    "collection_name": None,
    "application_name": None,
    "metadata_fields": None,
    "max_inline_attachment_bytes": None,
    "max_embedded_messages": None,
    "max_embedded_bytes": None,
    "session_ttl": None,
    "maxPoolSize": None,
    "tls": None,
    "event_listeners": None,
}
NOT_GIVEN_TO_MANAGERS = NOT_GIVEN | {
    "metadata_hook": None,
    "metadataHook": None,
    "feedback_hook": None,
    "feedbackHook": None,
    "save_on": None,
    "on_busy": None,
    "busy_timeout": None,
    "lease": None,
}


# None is not given.


@pytest.mark.parametrize("name", ["database_name", "collection_name"])
def test_none_does_not_move_a_session_elsewhere(
    server: str, database: str, driver: pymongo.MongoClient[Any], name: str
) -> None:
    with MongoDBSessionManagerFactory(server, database, "chats") as factory:
        factory.create_session_manager("s", **{name: None})
        asyncio.run(factory.create_session_manager_async("t", **{name: None}))
    assert {each["_id"] for each in driver[database]["chats"].find()} == {"s", "t"}


def test_none_leaves_every_option_of_a_factory(server: str, database: str, stored: Any, commands: CommandLog) -> None:
    seen: list[str] = []

    def hook(original: Any, action: str, session_id: str, **given: Any) -> Any:
        seen.append(action)
        return original(**given)

    with MongoDBSessionManagerFactory(
        server,
        database,
        application_name="support",
        metadata_fields=["customer"],
        metadata_hook=hook,
        feedbackHook=hook,
        save_on="invocation",
        max_embedded_messages=2,
        event_listeners=[commands],
    ) as factory:
        driver_options = {name for name in NOT_GIVEN if name in ("maxPoolSize", "tls", "event_listeners")}
        overrides = {name: None for name in NOT_GIVEN_TO_MANAGERS if name not in driver_options}
        with factory.create_session_manager(
            "s", database_name=None, client=None, connection_string=None, **overrides
        ) as m:
            commands.clear()
            agent(m, "hello")("hi")
            assert commands.names.count("update") == 1
            m.update_metadata({"customer": "Ada"})
            m.add_feedback({"rating": "up"})
            assert m.get_application_name() == "support"
    assert seen == ["update", "add"]


@OF_MANAGERS
def test_none_is_not_given_to_a_manager(server: str, database: str, entrance: Any) -> None:
    made = entrance(server, database, client=None, **NOT_GIVEN_TO_MANAGERS)
    options = made._options
    assert (options.collection_name, options.save_on, options.max_embedded_messages) == (
        "agent_sessions",
        "message",
        128,
    )
    close(made)


@pytest.mark.parametrize("entrance", REPOSITORIES.values(), ids=REPOSITORIES)
def test_none_is_not_given_to_a_repository(server: str, database: str, entrance: Any) -> None:
    made = entrance(server, database, client=None, **NOT_GIVEN)
    assert f"({database}.agent_sessions," in repr(made)
    close(made)


def close(made: Any) -> None:
    if isinstance(made, AsyncMongoDBSessionManager | AsyncMongoDBSessionRepository):
        asyncio.run(made.close())
    else:
        made.close()


@pytest.mark.parametrize("names", [("metadata_hook", "metadataHook"), ("metadataHook", "metadata_hook")])
def test_one_spelling_of_a_hook_may_be_none(server: str, database: str, names: tuple[str, str]) -> None:
    def hook(original: Any, action: str, session_id: str, **given: Any) -> Any:
        return "hooked"

    with MongoDBSessionManager("s", server, database, **{names[0]: None, names[1]: hook}) as manager:  # type: ignore[arg-type]
        assert manager.get_metadata() == "hooked"


# Unknown options.


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("aplication_name", "application_name"),
        ("colection_name", "collection_name"),
        ("metadata_field", "metadata_fields"),
        ("max_embeded_messages", "max_embedded_messages"),
        ("maxPoolsSize", "maxPoolSize"),
        ("server_selection_timeout_ms", "serverSelectionTimeoutMS"),
        ("nonsense", None),
    ],
)
def test_an_unknown_option_names_ours_first(name: str, meant: str | None) -> None:
    check_unknown(MongoDBSessionManagerFactory, name, meant)


@ENTRANCES
def test_an_unknown_option_is_refused_anywhere(entrance: Any) -> None:
    check_unknown(entrance, "colection_name", "collection_name")
    check_unknown(entrance, "nonsense", None)


def check_unknown(entrance: Any, name: str, meant: str | None) -> None:
    with pytest.raises(ConfigurationError) as raised:
        entrance(NOWHERE, **{name: 3})
    message = str(raised.value)
    assert message.startswith(f"unexpected option {name!r}")
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant!r}?" in message
    assert "application_name" in message
    assert raised.value.__cause__ is None


@OF_MANAGERS
def test_an_unknown_option_of_a_manager(entrance: Any) -> None:
    for name, meant in (("metadatahook", "metadata_hook"), ("saveon", "save_on")):
        with pytest.raises(ConfigurationError, match=f"did you mean {meant!r}"):
            entrance(NOWHERE, **{name: None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("aplication_name", "application_name"), ("colection_name", "collection_name"), ("nonsense", None)],
)
def test_an_unknown_override_names_what_can_be(
    factory: Any, commands: CommandLog, name: str, meant: str | None
) -> None:
    for create in (
        factory.create_session_manager,
        lambda *args, **kwargs: asyncio.run(factory.create_session_manager_async(*args, **kwargs)),
    ):
        with pytest.raises(
            ConfigurationError, match=f"unexpected option '{name}'.*expected one of: database_name"
        ) as e:
            create("s", **{name: None})
        assert meant is None or f"did you mean {meant!r}" in str(e.value)
        assert "pymongo" not in str(e.value)
    assert commands.names == []


def test_an_unknown_option_of_the_pool() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'maxPoolSize'"):
        MongoDBConnectionPool.initialize(NOWHERE, maxPolSize=5)
    assert MongoDBConnectionPool.get_client() is None


# Values that cannot be.


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_embedded_messages", "many", "must be an int >= 1, got 'many'"),
        ("max_embedded_messages", 0, "got 0"),
        ("max_embedded_bytes", 1.5, "got 1.5"),
        ("max_inline_attachment_bytes", "1 MB", "got '1 MB'"),
        ("session_ttl", 5, "datetime.timedelta, got 5"),
        ("save_on", True, "'overlap' or 'invocation', got True"),
        ("on_busy", "queue", "on_busy must be 'conflict', 'wait' or 'refuse', got 'queue'"),
        ("busy_timeout", -1, "busy_timeout must be a number of seconds >= 0"),
        ("busy_timeout", float("inf"), "got inf"),
        ("busy_timeout", True, "got True"),
        ("lease", 0, "lease must be a number of seconds > 0"),
        ("lease", float("nan"), "got nan"),
        ("lease", "soon", "got 'soon'"),
        ("metadata_hook", "hook", "function"),
        ("feedbackHook", 5, "feedback_hook"),
        ("application_name", b"support", "must be a str"),
        ("application_name", "\ud800", "UTF-8"),
        ("metadata_fields", 5, "list of field names, got 5"),
        ("metadata_fields", [5], r"metadata_fields\[0\] must be a str, got 5"),
        ("database_name", "\ud800", "UTF-8"),
        ("database_name", "a b", "must not contain ' '"),
        ("database_name", "a.b", r"must not contain '\.'"),
        ("database_name", "a$", "must not contain"),
        ("database_name", "a/b", "must not contain"),
        ("database_name", "x" * 64, "at most 63 bytes, got 64"),
        ("database_name", "ü" * 32, "at most 63 bytes, got 64"),
        ("database_name", 5, "must be a str, got 5"),
        ("collection_name", "system.sessions", "system."),
        ("collection_name", "a$b", "must not contain"),
        ("collection_name", "a.", "dot"),
        ("collection_name", "\ud800", "UTF-8"),
        ("collection_name", "x" * 171, "at most 170 bytes"),
        ("maxPoolSize", "many", "integer"),
        ("datetime_conversion", "bad", "datetime_conversion cannot be 'bad'"),
        ("serverSelectionTimeoutMS", "soon", "serverSelectionTimeoutMS"),
        ("tls", "maybe", "tls cannot be 'maybe'"),
        ("read_preference", 5, "read_preference"),
        ("uuidRepresentation", "none", "uuidRepresentation"),
    ],
)
def test_a_value_that_cannot_be_names_its_option(name: str, value: Any, words: str) -> None:
    check_refused(MongoDBSessionManagerFactory, name, value, words)


@OF_MANAGERS
def test_a_value_that_cannot_be_is_refused_anywhere(entrance: Any) -> None:
    check_refused(entrance, "max_embedded_messages", 0, "got 0")
    check_refused(entrance, "feedbackHook", 5, "feedback_hook")
    check_refused(entrance, "database_name", "a b", "must not contain ' '")
    check_refused(entrance, "application_name", b"support", "must be a str")
    check_refused(entrance, "tls", "maybe", "tls cannot be 'maybe'")


def check_refused(entrance: Any, name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        entrance(NOWHERE, **{name: value})
    assert name.replace("Hook", "_hook") in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("name", ["x" * 63, "ä-b", "a*b"])
def test_a_name_at_the_edge_is_taken(server: str, driver: pymongo.MongoClient[Any], name: str) -> None:
    with MongoDBSessionManager("s", server, name, "a.b" + "c" * 167) as manager:
        assert manager.get_metadata() == {"metadata": {}}
    driver.drop_database(name)


@pytest.mark.own_database
def test_the_longest_collection_name_has_room_for_all_that_belongs_to_it(
    server: str, database: str, stored: Any
) -> None:
    image = {"image": {"format": "png", "source": {"bytes": b"\x89" * 300_000}}}
    name = "c" * 170
    long = ("d" * 63).replace("d" * len(database), database, 1)
    with MongoDBSessionManager("s", server, long, name, max_embedded_messages=2) as manager:
        live = agent(manager, "one", "two")
        live([{"text": "look"}, image])
        live("again")
        manager.flush()
    with MongoDBSessionRepository(server, long, name) as repository:
        assert len(repository.list_messages("s", "agent")) == 4
    stored.database.client.drop_database(long)


@ENTRANCES
def test_a_secret_of_the_wrong_type_is_not_shown(entrance: Any) -> None:
    for secret in ("password", "tlsCertificateKeyFilePassword"):
        with pytest.raises(ConfigurationError, match=secret) as raised:
            entrance(NOWHERE, **{secret: [SECRET]})
        assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("name", ["tlsCertificateKeyFile", "tlsCAFile"])
@pytest.mark.parametrize("kind", ["missing", "folder", "nonsense"])
def test_a_file_that_cannot_be_read_names_its_option(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "nonsense":
        path.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=name) as raised:
        MongoDBSessionManager("s", NOWHERE, tls=True, **{name: str(path)})
    assert not isinstance(raised.value.__context__, OSError)
    with MongoDBSessionManagerFactory(NOWHERE, tls=True, **{name: str(path)}) as factory:
        with pytest.raises(ConfigurationError, match=name):
            factory.check()
        with pytest.raises(ConfigurationError, match=name):
            asyncio.run(factory.create_session_manager_async("s"))


@pytest.mark.parametrize(
    "option", ["tlsCAFile=/no/such/file", "datetime_conversion=bad", "tls=maybe", "maxPoolSize=-1"]
)
def test_an_option_of_the_connection_string_that_cannot_be(option: str) -> None:
    with pytest.raises(ConfigurationError, match=r"(?i)" + option.partition("=")[0]):
        MongoDBSessionManagerFactory(f"mongodb://127.0.0.1:1/?{option}")


# Connection strings.


@pytest.mark.parametrize("around", [("", "\n"), ("  ", ""), ("\t", "\r\n"), ("\n\n", " ")])
def test_white_space_around_a_connection_string_is_no_part_of_it(
    server: str, database: str, stored: Any, monkeypatch: pytest.MonkeyPatch, around: tuple[str, str]
) -> None:
    with MongoDBSessionManager("s", server.join(around), database) as manager:
        manager.update_metadata({"from": "argument"})
    monkeypatch.setenv("MONGODB_URI", server.join(around))
    with MongoDBSessionManager("t", database_name=database) as manager:
        manager.update_metadata({"from": "environment"})
    assert [each["metadata"]["from"] for each in stored.find()] == ["argument", "environment"]


@pytest.mark.parametrize(
    "connection_string", ["mongodb://host\n/db", f"mongodb://user:{SECRET}\r\n@host/", "mongodb://h/\0"]
)
def test_a_line_break_within_a_connection_string_is_refused(connection_string: str) -> None:
    with pytest.raises(ConfigurationError, match="line break") as raised:
        MongoDBSessionManagerFactory(connection_string)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("connection_string", [" ", "\n"])
def test_a_connection_string_of_white_space_alone_is_none(connection_string: str) -> None:
    with pytest.raises(ConfigurationError, match="no MongoDB connection configured"):
        MongoDBSessionManagerFactory(connection_string)


@pytest.mark.parametrize("scheme", ["mongodb", "mongodb+srv"])
def test_a_password_that_is_not_escaped_is_told_and_not_shown(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for password in ("{}@1", "1@{}", "{}:1", "1:{}", "{}/1", "1/{}", "{}?1", "1?{}", "1/{}?2", "{}@/1"):
        with pytest.raises(ConfigurationError, match=r"percent-encode.*quote_plus") as raised:
            MongoDBSessionManagerFactory(f"{scheme}://user:{password.format(SECRET)}@host.example.invalid/db?w=1")
        shown = "".join(traceback.format_exception(raised.value)) + caplog.text
        assert SECRET not in shown
        assert "user" not in str(raised.value).replace("user name", "")


@pytest.mark.parametrize(
    "uri", ["mongodb://h/?appName=me@x", "mongodb://h?appName=me@x", "mongodb://u:p%40%3A%2F@[::1]:1/d"]
)
def test_what_is_escaped_or_needs_not_be_is_taken(uri: str) -> None:
    MongoDBSessionManagerFactory(uri)


def test_the_library_knows_all_options_of_the_driver() -> None:
    for options in (
        {"appName": "a", "maxpoolsize": 5, "w": "majority", "journal": True, "tz_aware": True},
        {"retryWrites": False, "compressors": "zlib", "username": "u", "password": "p", "authSource": "a"},
        {"server_api": pymongo.server_api.ServerApi("1"), "document_class": dict, "uuidRepresentation": "standard"},
        {"read_preference": pymongo.ReadPreference.NEAREST, "event_listeners": [CommandLog()], "connect": False},
    ):
        MongoDBSessionManagerFactory(NOWHERE, **options)
        try:
            pymongo.MongoClient(NOWHERE, **{**options, "connect": False}).close()
        except PyMongoError as error:
            pytest.fail(f"the driver refuses them: {error}")
