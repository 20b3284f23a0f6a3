"""Configuration: the registry of pluggable components, and building dataclasses from documents.

The dataclass is the schema. `document` reads, composes and interpolates; `build` walks the dataclass and pydantic checks each value.
Every mistake becomes a `ConfigError` that names the file, the key and the remedy, before any process starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import logging
import math
import pkgutil
import sys
import types
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

import yaml
from pydantic import AllowInfNan, Field, TypeAdapter, ValidationError

from gentrain.document import COMMAND_LINE as COMMAND_LINE
from gentrain.document import ConfigError, Document, environment, join, reads_environment
from gentrain.document import load as load

log = logging.getLogger(__name__)

Fraction = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")

_plugins: dict[str, None] = {}  # that were loaded, in order
_LONGEST_SHOWN = 200  # characters of a value in a message
_HIDDEN = "_from_environment"  # attribute: field -> its value as the file has it, of fields that the environment gave


def option(default: Any = dataclasses.MISSING, help: str = "", *, unit: str = "", source: str = "") -> Any:
    """A dataclass field with what `gentrain methods NAME` prints: help, unit and the source (paper, equation) of its default.

    A mutable or callable default is called once per instance, as dataclasses' `default_factory` is.
    """
    metadata = {"help": help, "unit": unit, "source": source}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@contextmanager
def errors_about(key: str, otherwise: str = "") -> Iterator[None]:
    """A ConfigError that leaves it is about `key`, or the key below it that it names; a ValueError is one about `otherwise`, "" = `key`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.message, source=error.source, key=join(key, error.key)) from error
    except ValueError as error:
        raise ConfigError(str(error), key=otherwise or key) from error


# --- registry ---------------------------------------------------------------------------------------------------------------


class Component:
    """A pluggable thing. A base class names its kind (`class Method(Component, kind="method")`); `register` adds to that kind.

    Implementations live in the package of the base class; all its modules are imported when a name is first looked up.
    """

    kind: ClassVar[str]
    registered_name: ClassVar[str]
    _package: ClassVar[str]
    _registry: ClassVar[dict[str, type[Component]]]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind, cls._registry, cls._package = kind, {}, cls.__module__.rpartition(".")[0]

    @classmethod
    def available(cls) -> dict[str, type[Self]]:
        """Registered name -> class, of this kind, sorted by name."""
        _import_modules(cls._package)
        return cast(dict[str, type[Self]], dict(sorted(cls._registry.items())))


def register(name: str) -> Any:
    """Class decorator: makes a component available to configuration files as `name`."""

    def add(cls: type[Component]) -> type[Component]:
        present = cls._registry.get(name)
        if present is not None and (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{cls.kind} {name!r} is already registered by {present.__module__}.{present.__qualname__}")
        cls.registered_name = name
        cls._registry[name] = cls
        return cls

    return add


@cache
def _import_modules(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def load_plugins(document: Document) -> None:
    """Imports the user's own modules, named in `plugins:`: .py files (relative to the file that names them) or module names.

    Files are made absolute in the document. Raises ConfigError when one is missing or fails to import.
    """
    plugins = document.values.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise document.error("plugins", f"expected a list of .py files or module names, got {_shown(plugins)}")
    directory = Path(document.origin("plugins")).parent
    resolved = [str((directory / plugin).resolve()) if plugin.endswith(".py") else plugin for plugin in plugins]
    for index, plugin in enumerate(resolved):
        try:
            _import_plugin(plugin)
            _plugins[plugin] = None
        except (Exception, SystemExit) as error:  # a plugin is foreign code: whatever it raises is reported as a fault of that plugin
            message = f"plugin {plugins[index]!r} failed to import: {type(error).__name__}: {error}"
            raise document.error(f"plugins[{index}]", message) from error
    document.values["plugins"] = resolved


def loaded_plugins() -> list[str]:
    """Those of this process, for another one's `plugins:`."""
    return list(_plugins)


def _import_plugin(plugin: str) -> None:
    path = Path(plugin)
    # two files may have the same name
    name = f"gentrain_plugin_{path.stem}_{zlib.crc32(plugin.encode()):08x}" if plugin.endswith(".py") else plugin
    if name in sys.modules:
        return
    log.info("loading the plugin %s, whose code may do whatever you may", plugin)  # before it can do anything
    if name == plugin:
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


# --- building dataclasses ---------------------------------------------------------------------------------------------------


def build(schema: type[T], document: Document) -> T:
    """Makes an instance of the dataclass `schema` from a document. Raises ConfigError with file, key and remedy."""
    return cast(T, _build(schema, document.values, "", document))


def _build(schema: Any, value: Any, key: str, document: Document) -> Any:
    origin = typing.get_origin(schema)
    if value == "???":
        raise document.error(key, f"a value is required: {describe(schema)}; set it in the file or on the command line")
    if origin in (typing.Union, types.UnionType):
        arms = typing.get_args(schema)
        if value is None and type(None) in arms:
            return None
        nested = [arm for arm in arms if _is_nested(arm)]
        if nested:
            return _build(nested[0], value, key, document)
    elif _is_nested(schema):
        return _build_nested(schema, value, key, document)
    elif origin is dict and _is_nested(typing.get_args(schema)[1]):
        if not isinstance(value, Mapping):
            raise document.error(key, f"expected a mapping, got {_shown(value)}")
        return {str(k): _build(typing.get_args(schema)[1], v, join(key, str(k)), document) for k, v in value.items()}
    elif origin in (list, tuple) and _is_nested(typing.get_args(schema)[0]):
        if not isinstance(value, list):
            raise document.error(key, f"expected a list, got {_shown(value)}")
        return origin(_build(typing.get_args(schema)[0], v, f"{key}[{i}]", document) for i, v in enumerate(value))
    if _holds_bool(value) and not _allows_bool(schema):
        raise document.error(key, f"expected {describe(schema)}, got {_shown(value)}")
    given = environment(value, lambda message: document.error(key, message))
    try:
        return _adapter(schema).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int) or (isinstance(value, Mapping) and part in value))
        got = first["input"] if given == value else value  # what the environment gives is not shown
        raise document.error(key + place, f"expected {describe(schema)}, got {_shown(got)} ({first['msg']})") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _holds_bool(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, bool) or any(map(_holds_bool, inner))


def _allows_bool(schema: Any) -> bool:
    """pydantic takes true for 1; a config that says true where a number belongs is a mistake."""
    return schema in (bool, Any, dict, list) or isinstance(schema, bool) or any(map(_allows_bool, typing.get_args(schema)))


def _finite(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return math.isfinite(value) if isinstance(value, float) else all(map(_finite, inner))


def _allows_infinity(schema: Any) -> bool:
    """A field that has a meaning for .inf says so with pydantic's AllowInfNan."""
    return schema in (Any, dict, list) or isinstance(schema, AllowInfNan) or any(map(_allows_infinity, typing.get_args(schema)))


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _is_nested(schema: Any) -> bool:
    return isinstance(schema, type) and (dataclasses.is_dataclass(schema) or issubclass(schema, Component))


def describe(schema: Any) -> str:
    """A type as a reader of a config file would name it."""
    if schema is type(None):
        return "null"
    if typing.get_origin(schema) is Annotated:
        base, *constraints = typing.get_args(schema)
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        parts = [part for constraint in constraints for part in getattr(constraint, "metadata", [constraint])]
        rules = [f"{sign} {getattr(part, name)}" for part in parts for name, sign in signs.items() if hasattr(part, name)]
        return " ".join([describe(base), " and ".join(rules)]).strip()
    if typing.get_origin(schema) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(schema)))
    if typing.get_origin(schema) in (typing.Union, types.UnionType):
        return " or ".join(describe(arm) for arm in typing.get_args(schema))
    if typing.get_origin(schema) is list or Ellipsis in typing.get_args(schema):
        return f"a list, each {describe(typing.get_args(schema)[0])}"
    if typing.get_origin(schema) is tuple:
        return f"[{', '.join(describe(arm) for arm in typing.get_args(schema))}]"
    if typing.get_origin(schema) is not None:
        return str(schema).replace("typing.", "")
    if isinstance(schema, type) and issubclass(schema, Component):
        return f"a {schema.kind}"
    if dataclasses.is_dataclass(schema):
        return "a mapping"
    words = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}
    return words[schema] if schema in words else str(getattr(schema, "__name__", schema))


def _suggest(word: str, known: Iterable[str], what: str) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(word), known, 1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known) or 'none'}"


def _build_nested(schema: Any, value: Any, key: str, document: Document) -> Any:
    values = value
    if issubclass(schema, Component):
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping):
            raise document.error(key, f"expected the name of a {schema.kind} or a mapping with `name`, got {_shown(value)}")
        available = {name: cls for name, cls in schema.available().items() if issubclass(cls, schema)}
        values = dict(values)
        name = values.pop("name", schema.__dict__.get("registered_name"))  # a registered class needs no name to be chosen
        if name is None:
            raise document.error(key, f"`name` is missing; available {schema.kind}s: {', '.join(available)}")
        if not isinstance(name, str) or name not in available:
            raise document.error(f"{key}.name", f"no {schema.kind} is called {name!r}; {_suggest(name, available, 'available')}")
        schema = available[name]
    if not isinstance(values, Mapping):
        raise document.error(key, f"expected a mapping, got {_shown(value)}")
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for name in values:
        if name not in fields:
            raise document.error(join(key, name), f"unknown key; {_suggest(name, fields, 'valid keys')}")
    hints = typing.get_type_hints(schema, include_extras=True)
    arguments = {name: _build(hints[name], _with_default(fields[name], item), join(key, name), document) for name, item in values.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise document.error(join(key, name), f"a value is required: {describe(hints[name])}")
    hidden = {name: item for name, item in values.items() if reads_environment(item) and not reads_environment(to_dict(arguments[name]))}

    def hide(message: str) -> str:
        for name, item in hidden.items():
            message = message.replace(str(arguments[name]) or "\0", str(item))
        return message

    try:
        built = schema(**arguments)
    except ConfigError as error:
        raise document.error(join(key, error.key) if error.key else key, hide(error.message)) from None
    except ValueError as error:  # a dataclass' own __post_init__ check
        raise document.error(key, hide(str(error))) from None
    for name, item in values.items():  # after the checks of its own, which may tell more
        if not (_finite(arguments[name]) or _allows_infinity(hints[name])):
            raise document.error(join(key, name), f"expected {describe(hints[name])}, got {_shown(item)} (Input should be finite)")
    if hidden:
        vars(built)[_HIDDEN] = hidden
    return built


def _with_default(field: dataclasses.Field[Any], value: Any) -> Any:
    """Keys of a component without its name are set in the field's default component."""
    if isinstance(value, Mapping) and "name" not in value and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        if isinstance(default, Component):
            return {**to_dict(default), **value}
    return value


def to_dict(value: Any) -> Any:
    """The plain containers from which `build` makes an equal object: the resolved configuration that is saved with a run.

    What was read from the environment is `${oc.env:NAME}` in them, as in the file it came from.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hidden = getattr(value, _HIDDEN, {})
        items = {f.name: hidden.get(f.name, to_dict(getattr(value, f.name))) for f in dataclasses.fields(value) if f.init}
        return {"name": value.registered_name, **items} if isinstance(value, Component) else items
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)
