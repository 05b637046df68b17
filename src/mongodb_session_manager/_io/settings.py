"""Where MongoDB is, checked before anything is sent: a connection string with client options, or a borrowed client."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pymongo import MongoClient, common
from pymongo import errors as driver
from pymongo.uri_parser import parse_uri

from ..errors import ConfigurationError
from .drivers import check_client

if TYPE_CHECKING:
    from .drivers import Client

DEFAULT_DATABASE = "agent_sessions"

SOCKET_TIMEOUT_MS = 30_000
"""The default `socketTimeoutMS` of an owned client; the driver's default is to wait without a limit."""


@dataclass(frozen=True)
class Settings:
    """The connection settings: a connection string with client options, or a client that the caller owns."""

    connection_string: str | None = field(default=None, repr=False)
    client: Client | None = field(default=None, repr=False)
    client_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def checked(
        cls,
        connection_string: str | None,
        client: Client | None,
        client_options: Mapping[str, Any],
        ours: Iterable[str] = (),
    ) -> Settings:
        """Return valid settings; `MONGODB_URI` replaces a missing connection string.

        The error for an unknown option names `ours`, the caller's own.

        Raises:
            ConfigurationError: No connection or two connections are configured, or an option is unknown or invalid.
            ClientTypeError: `client` is not a MongoDB client.
        """
        client_options = _checked_options(client_options, ours)
        if client is not None:
            check_client(client)
            if connection_string is not None or client_options:
                raise ConfigurationError(
                    "client cannot be combined with connection_string or client options: a borrowed client is "
                    "configured by its owner"
                )
            return cls(client=client)
        connection_string = connection_string or os.environ.get("MONGODB_URI")
        if isinstance(connection_string, str):
            connection_string = connection_string.strip()
        if not connection_string:
            raise ConfigurationError(
                "no MongoDB connection configured: pass connection_string, set the environment variable MONGODB_URI, "
                "or pass client (an AsyncIOMotorClient, AsyncMongoClient or MongoClient)"
            )
        if not isinstance(connection_string, str):
            raise ConfigurationError(f"connection_string must be a str, not {type(connection_string).__name__}")
        _check_uri(connection_string)
        return cls(connection_string=connection_string, client_options=dict(client_options))

    def reason(self, error: Exception) -> str:
        """Return the text of a driver's error; empty if it can quote a secret of the connection string."""
        address = (self.connection_string or "").partition("://")[2]
        secrets = re.split(r"[:/@?&=]", address.rpartition("@")[0])
        secrets += [str(value) for name, value in self.client_options.items() if name.lower() in _SECRETS]
        return "" if any(secret and secret in str(error) for secret in secrets) else f": {error}"

    def refused(self, error: Exception) -> ConfigurationError:
        if isinstance(error, OSError):
            reason = f": {_unreadable(error, self.client_options)}"
        else:
            reason = self.reason(error)
            if files := [name for name in self.client_options if name.lower() in _FILES]:
                reason += f"; check {' and '.join(files)}"
        return ConfigurationError(f"the MongoDB client refused its configuration{reason}")

    def bounded_options(self) -> dict[str, Any]:
        named = {name.lower() for name in self.client_options} | set(
            re.findall(r"[?&](\w+)=", (self.connection_string or "").lower())
        )
        bound = {} if named & {"sockettimeoutms", "timeoutms"} else {"socketTimeoutMS": SOCKET_TIMEOUT_MS}
        return {**bound, **self.client_options}


def unexpected_option(name: str, expected: Iterable[str], of_driver: Iterable[str] = ()) -> ConfigurationError:
    """Return the error for an unknown option; it suggests the expected options before the driver's."""
    expected = list(expected)
    import difflib  # for this message only

    close = difflib.get_close_matches(name, expected, 1) or difflib.get_close_matches(name, list(of_driver), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    rest = " or an option of pymongo.MongoClient" if of_driver else ""
    listed = ", ".join(expected)
    return ConfigurationError(f"unexpected option {name!r}{hint} expected one of: {listed}{rest}")


_SECRETS = {"password", "authmechanismproperties", "tlscertificatekeyfilepassword"}

_FILES = {"tlscafile", "tlscertificatekeyfile", "tlscrlfile"}
"""Options whose validation reads a file: opening the client validates them, off the caller's event loop."""


@cache
def _driver_options() -> dict[str, str]:
    names = re.findall(r"`(\w+)`", MongoClient.__init__.__doc__ or "")
    return {name: name for name in common.VALIDATORS} | {
        name.lower(): name for name in names if name.lower() in common.VALIDATORS
    }


def _checked_options(given: Mapping[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    for name in given:
        if name.lower() not in _driver_options():
            raise unexpected_option(name, ours, _driver_options().values())
    options = {name: value for name, value in given.items() if value is not None}
    refusal = ""
    for name, value in options.items():
        try:
            if name.lower() not in _FILES:
                common.validate(name, value)
        except Exception as error:
            refusal = f"{name} cannot be used"
            if name.lower() not in _SECRETS:
                shown = reprlib.repr(value)
                refusal = f"{name} cannot be {shown}" + ("" if isinstance(error, LookupError) else f": {error}")
        if refusal:  # outside of `except`: an error that can contain a password must not become its context
            raise ConfigurationError(refusal)
    return options


def _unreadable(error: OSError, options: Mapping[str, Any]) -> str:
    names = [name for name, value in options.items() if name.lower() in _FILES]
    named = [name for name in names if error.filename is not None and options[name] == error.filename] or names
    reason = f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return f"{' or '.join(named) or 'a file of TLS'} cannot be read ({reason})"


_ESCAPE = "percent-encode the user name and the password (urllib.parse.quote_plus) if they contain any of :/?#[]@%"


def _check_uri(connection_string: str) -> None:
    if re.search(r"[\x00-\x1f\x7f]", connection_string):
        raise ConfigurationError("connection_string contains a line break or another control character")
    address = connection_string.partition("://")[2]
    authority = re.split("[/?]", address, maxsplit=1)[0]
    credentials = authority.rpartition("@")[0]
    # The driver would parse a part of the password as a host or a port, and show it.
    if "@" in credentials or credentials.count(":") > 1 or re.match(r"[^/?]*(/[^?]*|(/[^?]*)?\?[^=]*)@", address):
        raise ConfigurationError(f"connection_string cannot be parsed: {_ESCAPE}")
    if connection_string.startswith("mongodb+srv://"):
        return  # parsing it would ask DNS; the driver does that when it connects
    refusal = None
    options: Mapping[str, Any] = {}
    try:
        options = parse_uri(connection_string)["options"]
    except OSError as error:
        found = dict(re.findall(r"[?&](\w+)=([^&]*)", connection_string))
        refusal = f": {_unreadable(error, {name: unquote(value) for name, value in found.items()})}"
    except (driver.PyMongoError, ValueError, TypeError, LookupError) as error:
        refusal = Settings(connection_string).reason(error) or ("@" in address and f": {_ESCAPE}") or ""
    if refusal is not None:  # outside of `except`: the driver's error can contain the password
        raise ConfigurationError(
            f"connection_string is not mongodb://[user:password@]host[:port]/[database][?options]{refusal}"
        )
    if options.get("w") == 0:
        raise ConfigurationError("connection_string has w=0: a session cannot rely on unacknowledged writes")
