"""Configuration: YAML composition, overrides, the registry of pluggable components, and building dataclasses from it all.

The dataclass is the schema. OmegaConf reads, composes and interpolates; `build` walks the dataclass and pydantic checks each value.
Every mistake becomes a `ConfigError` that names the file, the key and the remedy, before any process starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

COMMAND_LINE = "command line"

Fraction = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")


class ConfigError(Exception):
    """A configuration a person has to mend. `str()` of it reads: FILE: KEY: what is wrong; what to do."""

    def __init__(self, message: str, *, source: str | None = None, key: str = ""):
        self.source, self.key, self.message = source, key, message
        super().__init__(": ".join(part for part in (source, key, message) if part))


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
        raise document.error("plugins", f"expected a list of .py files or module names, got {plugins!r}")
    directory = Path(document.origin("plugins")).parent
    resolved = [str((directory / plugin).resolve()) if plugin.endswith(".py") else plugin for plugin in plugins]
    for index, plugin in enumerate(resolved):
        try:
            _import_file(Path(plugin)) if plugin.endswith(".py") else importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # a plugin is foreign code: whatever it raises is reported as a fault of that plugin
            message = f"plugin {plugins[index]!r} failed to import: {type(error).__name__}: {error}"
            raise document.error(f"plugins[{index}]", message) from error
    document.values["plugins"] = resolved


def _import_file(path: Path) -> None:
    name = f"gentrain_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two plugins may have the same file name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


# --- loading and composing --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Document:
    """A composed, interpolated configuration and where each of its keys came from."""

    values: dict[str, Any]
    file: str
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    place: str = ""  # dotted key of this document in the whole one, for messages

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(message, source=self.origin(key), key=_join(self.place, key))

    def origin(self, key: str) -> str:
        """The file (or the command line) that last set `key`, or its nearest parent."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = re.sub(r"(^|\.)[^.\[]*$|\[[^\[]*$", "", key)
        return self.file

    def section(self, key: str) -> Document:
        """The mapping under the dotted `key`, as a document of its own."""
        values: Any = self.values
        for part in key.split("."):
            values = values[part]
        prefix = key + "."
        origins = {name.removeprefix(prefix): file for name, file in self.origins.items() if name.startswith(prefix)}
        return Document(values, self.origin(key), origins, _join(self.place, key))


def load(path: str | Path | None, overrides: Iterable[str] = (), extra: Mapping[str, Any] | None = None) -> Document:
    """Reads a YAML file (None: none) with its `base:` files over `extra`, applies `key=value` overrides, resolves interpolations.

    Raises ConfigError.
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    together: dict[str, Any] = {}  # the overrides, so that a component's name and its keys may come in any order
    _merge(values, dict(extra or {}))
    if path is not None:
        _merge(values, _read(Path(path), (), origins))
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"cannot read the override {item!r}; write it as key=value", source=COMMAND_LINE)
        if "[" in key:
            raise ConfigError("an override cannot reach into a list; give the whole list", source=COMMAND_LINE, key=key)
        try:
            parsed = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            message = f"cannot read the value of the override {item!r}: {_first_line(error)}"
            raise ConfigError(message, source=COMMAND_LINE, key=key) from error
        _merge(together, parsed)
        # A section that a file began stays that file's, where it lacks a key.
        origins.update({name: COMMAND_LINE for name, whole in _keys(parsed) if whole or name not in origins})
    _merge(values, together)
    document = Document(values, COMMAND_LINE if path is None else str(path), origins)
    try:
        document.values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(values), resolve=True))
    except OmegaConfBaseException as error:
        raise document.error(str(error.full_key or ""), _first_line(error)) from error
    return document


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _read(path: Path, above: tuple[Path, ...], origins: dict[str, str]) -> dict[str, Any]:
    """The file's values merged over those of its `base:` files, interpolations unresolved."""
    source = str(path)
    if path.resolve() in above:
        raise ConfigError("this file includes itself through `base:`", source=source, key="base")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        asked_by = f" (named in `base:` of {above[-1]})" if above else ""
        raise ConfigError(f"no such file{asked_by}{hint}", source=source) from None
    except (OSError, UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"cannot read it as a mapping of keys to values: {_first_line(error)}", source=source) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error), source=source, key=str(error.full_key or "")) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"not valid YAML{line}: {getattr(error, 'problem', None) or _first_line(error)}", source=source) from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError("the top level must be a mapping of keys to values", source=source)
    return _compose(cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False)), path, above, origins, "")


def _compose(own: dict[str, Any], path: Path, above: tuple[Path, ...], origins: dict[str, str], key: str) -> dict[str, Any]:
    """`own` merged over the files of its `base:`; any mapping of a file may have one, with names relative to that file."""
    source = str(path)
    for name in own:
        if not isinstance(name, str):
            raise ConfigError(f"keys must be text, got {name!r}", source=source, key=key)
    own = dict(own)
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError("expected a file name or a list of file names", source=source, key=f"{key}.base" if key else "base")
    values: dict[str, Any] = {}
    for base in bases:
        below: dict[str, str] = {}
        _merge(values, _read(path.parent / base, (*above, path.resolve()), below))
        origins.update({_join(key, name): file for name, file in below.items()})
    for name, value in own.items():
        origins[_join(key, name)] = source
        if isinstance(value, dict):
            own[name] = _compose(value, path, above, origins, _join(key, name))
    _merge(values, own)
    return values


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Deep merge; lists are replaced, and so is a component whose `name` changes (the old one's keys are not the new one's).

    A component may be written as its bare name on either side.
    """
    for name, value in new.items():
        present = into.get(name)
        if isinstance(present, str) and isinstance(value, Mapping) and "name" not in value and "${" not in present:
            present = into[name] = {"name": present}
        elif isinstance(value, str) and isinstance(present, dict) and "name" in present and "${" not in value:
            value = {"name": value}
        if isinstance(value, Mapping):
            if not isinstance(present, dict) or ("name" in present and value.get("name", present["name"]) != present["name"]):
                present = into[name] = {}
            _merge(present, value)
        else:
            into[name] = value


def _keys(values: Mapping[str, Any], key: str = "") -> Iterable[tuple[str, bool]]:
    """Every dotted key, and whether it holds a value rather than a section."""
    for name, value in values.items():
        yield _join(key, name), not isinstance(value, Mapping)
        if isinstance(value, Mapping):
            yield from _keys(value, _join(key, name))


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
            raise document.error(key, f"expected a mapping, got {value!r}")
        return {str(k): _build(typing.get_args(schema)[1], v, _join(key, str(k)), document) for k, v in value.items()}
    elif origin in (list, tuple) and _is_nested(typing.get_args(schema)[0]):
        if not isinstance(value, list):
            raise document.error(key, f"expected a list, got {value!r}")
        return origin(_build(typing.get_args(schema)[0], v, f"{key}[{i}]", document) for i, v in enumerate(value))
    try:
        if _holds_bool(value) and not _allows_bool(schema):
            raise document.error(key, f"expected {describe(schema)}, got {value!r}")
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int) or (isinstance(value, Mapping) and part in value))
        raise document.error(key + place, f"expected {describe(schema)}, got {first['input']!r} ({first['msg']})") from None


def _holds_bool(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, bool) or any(map(_holds_bool, inner))


def _allows_bool(schema: Any) -> bool:
    """pydantic takes true for 1; a config that says true where a number belongs is a mistake."""
    return schema in (bool, Any, dict, list) or isinstance(schema, bool) or any(map(_allows_bool, typing.get_args(schema)))


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
            raise document.error(key, f"expected the name of a {schema.kind} or a mapping with `name`, got {value!r}")
        available = {name: cls for name, cls in schema.available().items() if issubclass(cls, schema)}
        values = dict(values)
        name = values.pop("name", schema.__dict__.get("registered_name"))  # a registered class needs no name to be chosen
        if name is None:
            raise document.error(key, f"`name` is missing; available {schema.kind}s: {', '.join(available)}")
        if not isinstance(name, str) or name not in available:
            raise document.error(f"{key}.name", f"no {schema.kind} is called {name!r}; {_suggest(name, available, 'available')}")
        schema = available[name]
    if not isinstance(values, Mapping):
        raise document.error(key, f"expected a mapping, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for name in values:
        if name not in fields:
            raise document.error(_join(key, name), f"unknown key; {_suggest(name, fields, 'valid keys')}")
    hints = typing.get_type_hints(schema, include_extras=True)
    arguments = {name: _build(hints[name], item, _join(key, name), document) for name, item in values.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise document.error(_join(key, name), f"a value is required: {describe(hints[name])}")
    try:
        return schema(**arguments)
    except ConfigError as error:
        raise document.error(_join(key, error.key) if error.key else key, error.message) from None
    except ValueError as error:  # a dataclass' own __post_init__ check
        raise document.error(key, str(error)) from None


def to_dict(value: Any) -> Any:
    """The plain containers from which `build` makes an equal object: the resolved configuration that is saved with a run."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"name": value.registered_name, **items} if isinstance(value, Component) else items
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)
