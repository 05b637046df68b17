"""What the package shows, that its twins agree, and that its modules import downwards only."""

from __future__ import annotations
import __future__

import ast
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from strands.multiagent import MultiAgentBase
from strands.session import RepositorySessionManager
from strands.session.session_repository import SessionRepository
from strands.storage import S3Storage, Storage
from strands.types.exceptions import SessionException, StorageError

import mongodb_session_manager as package
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    MongoDBStorage,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    embedded,
    errors,
    fastapi,
    hooks,
)

SOURCE = Path(package.__file__).parent

# A package may import those before it; the last ones stand on top, each alone.
LAYERS = [
    "errors",
    "_format",
    "_io",
    "_notifications",
    "_store",
    "_storage",
    "_copying",
    "_repository",
    "_managers",
    "hooks",
    "__init__",
]
ON_TOP = {"embedded": {"errors"}, "demo": {"errors", "embedded"}, "fastapi": {"errors", "_managers", "__init__"}}


# Public names.


def test_all_is_sorted_and_without_doubles() -> None:
    constants_first = sorted(set(package.__all__), key=lambda name: (not name.isupper(), name))
    assert package.__all__ == constants_first


def test_all_is_what_is_public() -> None:
    public = {
        name
        for name in dir(package)
        if not name.startswith("_")
        and not isinstance(vars(package).get(name), ModuleType | type(__future__.annotations))
    }
    assert public == set(package.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    public = {name: getattr(package, name) for name in package.__all__}
    of_code = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert [name for name, value in of_code.items() if not inspect.getdoc(value)] == []


def mentioned(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield hint
    for part in typing.get_args(hint):
        yield from mentioned(part)


# Imported for type checkers only.
LATER = {"MultiAgentBase": MultiAgentBase, "Session": object, "Config": object}


def annotations(owner: Any) -> Iterator[Any]:
    """The types that a function takes and returns, or those of a class's attributes and public methods."""
    for name, hint in typing.get_type_hints(owner, localns=LATER).items():
        if not name.startswith("_"):
            yield from mentioned(hint)
    if inspect.isclass(owner):
        for method in [owner.__init__, *methods(owner).values()]:
            if inspect.isfunction(method):
                yield from annotations(method)


PUBLIC = [package, hooks, embedded, fastapi]
DOCUMENTED = [
    value
    for module in PUBLIC
    for name in module.__all__
    if inspect.isfunction(value := getattr(module, name)) or inspect.isclass(value)
]


def test_every_type_that_is_taken_or_returned_is_public() -> None:
    public = [getattr(module, name) for module in PUBLIC for name in module.__all__]
    private = {
        (owner.__qualname__, hint)
        for owner in DOCUMENTED
        for hint in annotations(owner)
        if getattr(hint, "__module__", "").startswith(package.__name__) and hint not in public
    }
    assert private == set()


def test_the_help_of_the_package_shows_no_private_module() -> None:
    text = pydoc.plain(pydoc.render_doc(package))
    contents = text.partition("PACKAGE CONTENTS\n")[2].partition("\n\n")[0].split("\n")
    assert {line.strip() for line in contents if not line.strip().startswith("_")} == {
        *("demo", "embedded (package)", "errors", "fastapi (package)", "hooks (package)")
    }
    assert {line.strip() for line in contents if line.strip().startswith("_")} == {
        f"{name} (package)" for name in LAYERS if name.startswith("_") and name != "__init__"
    }
    assert [name for name in package.__all__ if name not in text] == []


ORIGINAL = """
    MongoDBSessionManager MongoDBSessionRepository MongoDBConnectionPool MongoDBSessionManagerFactory
    GUARDRAIL_STOP_REASONS GUARDRAIL_ACTION_BLOCKED
    create_mongodb_session_manager initialize_global_factory get_global_factory close_global_factory
    FeedbackSNSHook create_feedback_sns_hook MetadataSQSHook create_metadata_sqs_hook
    MetadataWebSocketHook create_metadata_websocket_hook
    is_feedback_sns_hook_available is_metadata_sqs_hook_available is_metadata_websocket_hook_available
"""


def test_every_name_of_the_original_is_at_the_root() -> None:
    assert set(ORIGINAL.split()) - set(package.__all__) == set()
    assert package.GUARDRAIL_ACTION_BLOCKED == "BLOCKED"


def test_every_name_of_the_originals_hooks_is_in_hooks() -> None:
    same = {name: name for name in ORIGINAL.split() if name.endswith(("Hook", "_sqs_hook", "_websocket_hook"))}
    originals = {**same, "create_feedback_hook": "create_feedback_sns_hook"}
    assert sorted(hooks.__all__) == sorted(originals)
    assert {*originals} <= {*dir(hooks)}
    for name, here in originals.items():
        assert getattr(hooks, name) is getattr(package, here)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = hooks.nothing_of_that_name  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert package.__version__ == metadata.version("mongodb-session-manager")
    assert "__version__" in dir(package)

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert not hasattr(package, "__version__")


def test_what_strands_expects() -> None:
    assert issubclass(MongoDBSessionManager, RepositorySessionManager)
    assert issubclass(AsyncMongoDBSessionManager, RepositorySessionManager)
    assert issubclass(MongoDBSessionRepository, SessionRepository)


def test_the_storage_is_one_of_strands() -> None:
    assert issubclass(MongoDBStorage, Storage)
    for name in ("write", "read", "delete", "list", "namespace"):
        assert parameters(getattr(MongoDBStorage, name)) == parameters(getattr(S3Storage, name))
        assert is_async(getattr(MongoDBStorage, name)) == is_async(getattr(S3Storage, name))
    assert MongoDBStorage.search is Storage.search


def test_the_storage_closes_in_both_worlds() -> None:
    found = methods(MongoDBStorage)
    assert found.keys() == {"write", "read", "delete", "list", "namespace", "close", "close_async"}
    assert not is_async(found["close"])
    assert is_async(found["close_async"])


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


# Twins.


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The public methods that a class, or a base of it in this package, defines."""
    own = [base for base in reversed(cls.__mro__) if base.__module__.startswith(f"{package.__name__}.")]
    functions = {
        name: value.__func__ if isinstance(value, classmethod | staticmethod) else value
        for base in own
        for name, value in vars(base).items()
        if not name.startswith("_")
    }
    return {name: value for name, value in functions.items() if inspect.isfunction(value)}


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, object]]:
    """Name, kind and default of each parameter."""
    return [
        (parameter.name, parameter.kind.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


def all_parameters(cls: type) -> dict[str, list[tuple[str, str, object]]]:
    return {name: parameters(method) for name, method in methods(cls).items()}


def test_both_repositories_have_the_same_methods() -> None:
    assert all_parameters(MongoDBSessionRepository) == all_parameters(AsyncMongoDBSessionRepository)
    assert parameters(MongoDBSessionRepository) == parameters(AsyncMongoDBSessionRepository)


def test_one_repository_awaits_and_the_other_does_not() -> None:
    assert {name for name, method in methods(AsyncMongoDBSessionRepository).items() if not is_async(method)} == set()
    assert {name for name, method in methods(MongoDBSessionRepository).items() if is_async(method)} == set()


@pytest.mark.parametrize("cls", [MongoDBSessionRepository, MongoDBSessionManagerFactory, MongoDBSessionManager])
def test_a_method_that_is_made_from_its_twin_looks_like_one_that_was_written(cls: type) -> None:
    for name, method in vars(cls).items():
        if not name.startswith("_") and inspect.isfunction(method):
            assert (method.__module__, method.__qualname__) == (cls.__module__, f"{cls.__name__}.{name}")
            assert inspect.unwrap(method) is method, "FastAPI looks there whether a result must be awaited"
            assert pickle.loads(pickle.dumps(method)) is method


def test_the_repositories_document_the_same() -> None:
    sync, asynchronous = methods(MongoDBSessionRepository), methods(AsyncMongoDBSessionRepository)
    assert [name for name in sync if inspect.getdoc(sync[name]) != inspect.getdoc(asynchronous[name])] == []


def test_the_repository_has_the_parameters_of_strands() -> None:
    names = {name for name in vars(SessionRepository) if not name.startswith("_")}
    assert names >= {"create_session", "list_messages", "create_multi_agent", "update_multi_agent"}
    for name in names:
        ours, theirs = parameters(getattr(MongoDBSessionRepository, name)), parameters(getattr(SessionRepository, name))
        added = [parameter for parameter in ours if parameter not in theirs]
        assert [parameter for parameter in ours if parameter in theirs] == theirs
        assert {parameter[:2] for parameter in added} <= {
            (option, "KEYWORD_ONLY") for option in ("owner", "newest_first", "before")
        }


def test_both_managers_have_the_same_methods() -> None:
    sync, asynchronous = all_parameters(MongoDBSessionManager), all_parameters(AsyncMongoDBSessionManager)
    assert asynchronous.keys() - sync.keys() == {"open"}
    assert sync.keys() - asynchronous.keys() == set()
    assert sync == {name: asynchronous[name] for name in sync}
    assert parameters(MongoDBSessionManager) == parameters(AsyncMongoDBSessionManager)


def test_one_manager_awaits_and_the_other_does_not() -> None:
    sync, asynchronous = methods(MongoDBSessionManager), methods(AsyncMongoDBSessionManager)
    assert {name for name, method in sync.items() if is_async(method)} == set()
    # The tool is made without asking the database.
    waiting = {"append_message", "initialize", "redact_latest_message", "register_hooks", "sync_agent"}
    waiting |= {"initialize_multi_agent", "sync_multi_agent"}
    assert {name for name, method in asynchronous.items() if not is_async(method)} == waiting | {"get_metadata_tool"}


def test_what_strands_calls_is_synchronous_on_both_managers() -> None:
    names = ["initialize", "append_message", "redact_latest_message", "sync_agent", "register_hooks"]
    names += ["initialize_multi_agent", "sync_multi_agent"]
    for cls in (MongoDBSessionManager, AsyncMongoDBSessionManager):
        for name in names:
            assert not is_async(getattr(cls, name))
            assert accepts_as_much(getattr(cls, name), getattr(RepositorySessionManager, name))


def test_the_managers_are_context_managers() -> None:
    assert hasattr(MongoDBSessionManager, "__enter__")
    assert not hasattr(MongoDBSessionManager, "__aenter__")
    assert hasattr(AsyncMongoDBSessionManager, "__aenter__")
    assert not hasattr(AsyncMongoDBSessionManager, "__enter__")


def test_the_factory_has_each_method_twice() -> None:
    found = methods(MongoDBSessionManagerFactory)
    del found["get_notification_stats"]  # counted in this process, nobody waits for it
    blocking = {name for name in found if not name.endswith("_async")}
    finding = {"list_sessions", "count_sessions", "session_exists", "get_session_summary", "delete_session"}
    labels = {"update_session", "claim_session", "export_owner", "erase_owner"}
    content = {"list_messages", "get_usage", "get_feedbacks", "add_feedback"}
    content |= {"get_metadata", "update_metadata", "delete_metadata"}
    copying = {"export_session", "import_session", "fork_session", "rewind_session", "write_back"}
    others = {"create_session_manager", "create_storage", "get_connection_stats", "ping", "check", "close"}
    assert blocking == finding | labels | content | copying | others
    blocking -= {"create_storage"}  # which waits for nothing
    assert found.keys() == blocking | {f"{name}_async" for name in blocking} | {"create_storage"}
    for name in blocking:
        twin = found[f"{name}_async"]
        assert parameters(twin) == parameters(found[name])
        assert is_async(twin)
        assert not is_async(found[name])


def test_a_factory_finds_copies_and_deletes_as_a_repository_does() -> None:
    theirs, ours = all_parameters(MongoDBSessionRepository), all_parameters(MongoDBSessionManagerFactory)
    finding = ("list_sessions", "count_sessions", "session_exists", "get_session_summary", "delete_session")
    copying = ("export_session", "import_session", "fork_session", "rewind_session", "write_back")
    content = ("list_messages", "get_usage", "get_feedbacks", "add_feedback")
    of_metadata = ("get_metadata", "update_metadata", "delete_metadata")
    of_owners = ("update_session", "claim_session", "export_owner", "erase_owner")
    for name in (*finding, *copying, *content, *of_metadata, *of_owners):
        assert ours[name] == theirs[name]


def test_the_one_call_constructors_are_twins() -> None:
    assert parameters(create_mongodb_session_manager_async) == parameters(create_mongodb_session_manager)
    assert is_async(create_mongodb_session_manager_async)
    assert not is_async(create_mongodb_session_manager)


def test_a_factory_takes_what_a_manager_takes_but_the_session() -> None:
    of_manager = [parameter for parameter in parameters(MongoDBSessionManager)[1:] if parameter[0] != "_shared"]
    assert parameters(MongoDBSessionManagerFactory) == of_manager


def is_async(function: Callable[..., Any]) -> bool:
    is_pending = function.__annotations__.get("return") == "PendingSession"
    return is_pending or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def accepts_as_much(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Tell whether each parameter of `theirs` is one of `ours`, in the same place."""
    required = [parameter for parameter in parameters(theirs) if parameter[1] != "VAR_KEYWORD"]
    return parameters(ours)[: len(required)] == required and parameters(ours)[-1][1] == "VAR_KEYWORD"


# Errors.

BRANCH = re.compile(r"^(?P<trunk>[ │]*)[├└]── (?P<name>\w+)(?: +also (?P<builtin>\w+))?")


def drawn_tree() -> dict[str, tuple[str, str | None]]:
    """Of each error in the docstring's tree but the root: its parent and the builtin it also is."""
    lines = (errors.__doc__ or "").splitlines()
    path = ["MongoDBSessionError"]
    tree = {}
    for line in lines:
        if found := BRANCH.match(line):
            depth = len(found["trunk"]) // 4
            path[depth:] = [found["name"]]
            tree[found["name"]] = (path[depth - 1], found["builtin"])
    return tree


def raised() -> dict[str, type[BaseException]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }


def test_the_tree_of_errors_is_as_drawn() -> None:
    classes = raised()
    assert "    MongoDBSessionError                 also Strands' SessionException and StorageError" in (
        errors.__doc__ or ""
    )
    assert MongoDBSessionError.__bases__ == (SessionException, StorageError)
    assert {name: [base.__name__ for base in cls.__bases__] for name, cls in classes.items()} == {
        "MongoDBSessionError": ["SessionException", "StorageError"],
        **{name: [parent] + [builtin] * bool(builtin) for name, (parent, builtin) in drawn_tree().items()},
    }


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigurationError", ValueError),
        ("ClientTypeError", TypeError),
        ("ClientTypeError", ValueError),
        ("InvalidArgumentError", ValueError),
        ("MessageTooLargeError", ValueError),
        ("StateTooLargeError", ValueError),
        ("SessionNotFoundError", LookupError),
        ("AgentNotFoundError", LookupError),
        ("SessionConflictError", RuntimeError),
        ("SessionClosedError", RuntimeError),
        ("FactoryNotInitializedError", RuntimeError),
        ("DatabaseUnavailableError", ConnectionError),
        ("DatabaseTimeoutError", TimeoutError),
    ],
)
def test_errors_are_what_a_python_user_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(raised()[name], builtin)


def test_every_error_is_public_and_of_the_one_root() -> None:
    assert raised().keys() - set(package.__all__) == set()
    for cls in raised().values():
        assert issubclass(cls, MongoDBSessionError)
        assert issubclass(cls, SessionException)
        assert str(cls("what happened")) == "what happened"


# Imports.


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by the name that `ORDER` gives them; those of a subpackage by the subpackage's."""
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """The absolute names that a module imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    parts = [package.__name__, *module.split(".")][:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = parts[: len(parts) - node.level + 1] if node.level else []
            origin = [*origin, *([node.module] if node.module else [])]
            found.add(".".join(origin))
            found.update(".".join([*origin, alias.name]) for alias in node.names)
    return frozenset(found)


@cache
def own_imports(module: str) -> frozenset[str]:
    """The modules of the package that a module imports."""
    known = modules()
    prefix = f"{package.__name__}."
    names = {name.removeprefix(prefix) for name in imports(module) if name.startswith(prefix)}
    return frozenset(
        {known_name for name in names for known_name in (name, f"{name}.__init__") if known_name in known} - {module}
    )


def imported_by(name: str) -> set[str]:
    """The modules of the package that import `name` or something in it."""
    return {
        module
        for module in modules()
        if any(imported == name or imported.startswith(f"{name}.") for imported in imports(module))
    }


def layer(module: str) -> str:
    return module.split(".")[0]


def layers_below(name: str) -> set[str]:
    """The other packages that a package imports."""
    own = [module for module in modules() if layer(module) == name]
    return {layer(imported) for module in own for imported in own_imports(module)} - {name}


def test_the_walk_sees_imports() -> None:
    assert own_imports("_format.documents") == {"_format.codec", "_format.dates", "_format.ids"}
    assert own_imports("_format.decoder") == {"_format.marked", "errors"}
    assert "pymongo.ReturnDocument" in imports("_store.opening")


def test_every_module_has_its_place() -> None:
    assert set(map(layer, modules())) == {*LAYERS, *ON_TOP}


def test_imports_run_downwards() -> None:
    upwards = {name: layers_below(name) - set(LAYERS[:floor]) for floor, name in enumerate(LAYERS)}
    assert {name: above for name, above in upwards.items() if above} == {}


@pytest.mark.parametrize("name", ON_TOP)
def test_what_stands_on_top_stands_alone(name: str) -> None:
    assert layers_below(name) <= ON_TOP[name]


def test_each_package_says_what_it_is_in_one_line() -> None:
    packages = list(SOURCE.glob("_*/__init__.py"))
    assert len(packages) == 8
    assert [path for path in packages if len(path.read_text(encoding="utf-8").splitlines()) != 1] == []


def test_nothing_imports_in_a_circle() -> None:
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> Iterator[str]:
        if module in way:
            yield " -> ".join([*way[way.index(module) :], module])
        elif module not in done:
            for imported in sorted(own_imports(module)):
                yield from walk(imported, (*way, module))
            done.add(module)

    assert [circle for module in modules() for circle in walk(module, ())] == []


def test_one_module_knows_motor() -> None:
    assert imported_by("motor") == {"_io.drivers"}


def test_one_module_knows_aws() -> None:
    assert imported_by("aioboto3") == {"hooks._aws"}
    assert imported_by("aiobotocore") | imported_by("botocore") | imported_by("boto3") == {"hooks._aws"}


def test_two_modules_know_threads() -> None:
    assert imported_by("threading") | imported_by("concurrent") | imported_by("_thread") == {"_io.loop", "_io.portal"}


def test_one_package_knows_clients() -> None:
    clients = {"pymongo.MongoClient", "pymongo.AsyncMongoClient", "pymongo.asynchronous", "pymongo.synchronous"}
    assert {layer(module) for name in clients for module in imported_by(name)} == {"_io", "embedded"}


NOT_PURE = {"_format.malformed"}  # it has a logger
PURE = [
    "errors",
    *(name for name in modules() if name.startswith("_format.") and name not in NOT_PURE),
    *("_copying.import_checks", "_copying.export_format", "_copying.fork_document", "_copying.rewind_statement"),
    "_managers.capture",
]


def test_pure_modules_do_no_io() -> None:
    roots = {(module, name.split(".")[0]) for module in PURE for name in imports(module)}
    impure = {"asyncio", "anyio", "motor", "pymongo", "threading", "concurrent", "socket", "logging"}
    assert [(module, root) for module, root in roots if root in impure] == []


def test_the_codec_and_the_export_format_know_more_of_bson_than_ids() -> None:
    used = {module: {name for name in imports(module) if name.split(".")[0] in {"bson", "pymongo"}} for module in PURE}
    assert [module for module, names in used.items() if not names <= {"bson", "bson.ObjectId", "bson.MaxKey"}] == [
        "_format.decoder",
        "_format.encoder",
        "_format.marked",
        "_copying.export_format",
    ]


def test_the_unit_of_work_does_no_io() -> None:
    roots = {name.split(".")[0] for name in imports("_managers.unit_of_work")}
    assert roots & {"asyncio", "anyio", "motor", "threading", "concurrent"} == set()


def test_importing_the_package_imports_what_it_needs_and_no_more() -> None:
    program = """import sys, strands
before = {*sys.modules}
import mongodb_session_manager
print(*sorted(sys.modules.keys() - before), sep="\\n")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=100
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "mongodb_session_manager._managers.sync_manager" in loaded
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {"aioboto3", "aiobotocore", "anyio", "gridfs", "motor"}
    assert not loaded & {"pymongo.encryption_options", "strands.multiagent"}
    packages = {".".join(name.split(".")[:2]) for name in loaded}
    assert not packages & {f"{package.__name__}.{name}" for name in ("_copying", "demo", "embedded", "fastapi")}
    assert loaded & aws_modules() == set()


def aws_modules() -> set[str]:
    """The modules of the package that import the AWS client."""
    return {f"{package.__name__}.{module}" for module in imported_by("aioboto3") | imported_by("aiobotocore")}


def test_no_test_module_imports_another() -> None:
    modules = {path: path.read_text() for path in Path(__file__).parent.rglob("*.py")}
    importing = r"(?m)^\s*(?:from|import) (?:tests\.)?test_"
    assert [path.name for path, text in modules.items() if re.search(importing, text)] == []
