"""The process-wide factory, and the factories of the applications in the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

from .._io.loop import Lock
from ..errors import FactoryNotInitializedError
from .factory import MongoDBSessionManagerFactory
from .options import ManagerOptions
from .pool import MongoDBConnectionPool

_global_lock = Lock()
_global_factory: MongoDBSessionManagerFactory | None = None
_of_applications: list[MongoDBSessionManagerFactory] = []


def initialize_global_factory(
    connection_string: str | None = None,
    database_name: str | None = None,
    collection_name: str | None = "agent_sessions",
    **options: Unpack[ManagerOptions],
) -> MongoDBSessionManagerFactory:
    """Create the process-wide factory, close an earlier one, and return it.

    The arguments are the same as for `MongoDBSessionManagerFactory`. It uses the connection of `MongoDBConnectionPool`.
    """
    factory = MongoDBSessionManagerFactory(connection_string, database_name, collection_name, **options)
    _exchange(factory)
    return factory


def get_global_factory() -> MongoDBSessionManagerFactory:
    """Return the process-wide factory. Without one, return the factory of the only application of the process.

    Raises:
        FactoryNotInitializedError: There is no factory, or several applications have one each.
    """
    factories = _of_applications if _global_factory is None else [_global_factory]
    if len(factories) > 1:
        raise FactoryNotInitializedError(
            f"{len(factories)} applications of this process have a factory each, and there is no global one: get the "
            "application's with mongodb_session_manager.fastapi.Factory"
        )
    if not factories:
        raise FactoryNotInitializedError("no global factory: call initialize_global_factory(...) first")
    return factories[0]


def close_global_factory() -> None:
    """Close the process-wide factory, if there is one."""
    _exchange(None)


def _exchange(factory: MongoDBSessionManagerFactory | None) -> None:
    global _global_factory
    with _global_lock:
        if factory is not None:
            factory._share(MongoDBConnectionPool._replace(factory._connection, taking=True))
        earlier, _global_factory = _global_factory, factory
    if earlier is not None:
        earlier.close()


@contextmanager
def factory_of_application(factory: MongoDBSessionManagerFactory) -> Iterator[None]:
    with _global_lock:
        _of_applications.append(factory)
    try:
        yield
    finally:
        with _global_lock:
            _of_applications.remove(factory)
