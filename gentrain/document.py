"""Reading configuration files: composition by `base:`, overrides, interpolation, values of the environment.

A file may come from anybody, so what reading one may cost is bounded: its size and depth, what its aliases and interpolations expand to.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf._yaml import get_yaml_loader  # internal: OmegaConf.load would read interpolations before they are checked
from omegaconf.errors import OmegaConfBaseException

COMMAND_LINE = "command line"

MAX_BYTES = 2**18  # of one file
MAX_FILES = 100  # read for one document, a file counting each time that it is named
MAX_VALUES = 10_000  # of one file, aliases written out
MAX_DEPTH = 50  # of mappings and lists in each other
MAX_EXPANDED = 1_000_000  # characters that all values have together when interpolations are written out
_REFERENCE_COST = 500  # characters that one interpolation counts for: following it takes time

_INTERPOLATION = re.compile(r"\$\{(?:(?P<dots>\.*)(?P<key>[\w-]+(?:\.[\w-]+|\[\d+\])*)|output:[\w-]+|oc\.env:[^${}]+)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:([^${},]+)(?:,([^${}]*))?\}")
_HIDDEN = re.compile("\0([^\0]*)\0")  # what stands for `${...}` of the environment while OmegaConf resolves the others
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # commands for terminals, which YAML refuses unless they are escaped
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(Exception):
    """A configuration a person has to mend. `str()` of it reads: FILE: KEY: what is wrong; what to do."""

    def __init__(self, message: str, *, source: str | None = None, key: str = ""):
        self.source, self.key, self.message = source, key, message
        super().__init__(": ".join(part for part in (source, key, message) if part))


@dataclasses.dataclass
class Document:
    """A composed, interpolated configuration and where each of its keys came from. `${oc.env:...}` is still in it: see `environment`."""

    values: dict[str, Any]
    file: str
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    place: str = ""  # dotted key of this document in the whole one, for messages

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(message, source=self.origin(key), key=join(self.place, key))

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
        return Document(values, self.origin(key), origins, join(self.place, key))


def load(path: str | Path | None, overrides: Iterable[str] = (), extra: Mapping[str, Any] | None = None) -> Document:
    """Reads a YAML file (None: none) with its `base:` files over `extra`, applies `key=value` overrides, resolves interpolations.

    Raises ConfigError.
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    together: dict[str, Any] = {}  # the overrides, so that a component's name and its keys may come in any order
    _merge(values, dict(extra or {}))
    if path is not None:
        try:
            _merge(values, _Reader().read(Path(path), (), origins))
        except RecursionError:
            raise ConfigError(f"its `base:` files, one in the other, are nested more than {MAX_DEPTH} deep", source=str(path)) from None
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"cannot read the override {item!r}; write it as key=value", source=COMMAND_LINE)
        if "[" in key:
            raise ConfigError("an override cannot reach into a list; give the whole list", source=COMMAND_LINE, key=key)
        try:
            parsed = _parse(text)
        except (yaml.YAMLError, ValueError) as error:
            message = f"cannot read the value of the override {item[:100]!r}: {_first_line(error)}"
            raise ConfigError(message, source=COMMAND_LINE, key=key) from error
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        _merge(together, parsed)
        for name, whole in _keys(parsed):
            if whole:
                origins.pop(join(name, "name"), None)  # of the component that it names or replaces
        # A section that a file began stays that file's, where it lacks a key.
        origins.update({name: COMMAND_LINE for name, whole in _keys(parsed) if whole or name not in origins})
    _merge(values, together)
    document = Document(values, COMMAND_LINE if path is None else str(path), origins)
    document.values = _interpolated(document)
    return document


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def join(key: str, name: str) -> str:
    """The dotted key of `name` within `key`."""
    return f"{key}.{name}" if key and name else key or name


# --- reading and composing files --------------------------------------------------------------------------------------------


class _Reader:
    """Reads and composes the files of one document."""

    def __init__(self) -> None:
        self._files = 0

    def read(self, path: Path, above: tuple[Path, ...], origins: dict[str, str]) -> dict[str, Any]:
        """The file's values merged over those of its `base:` files, interpolations unresolved."""
        source = str(path)
        self._files += 1
        if path.resolve() in above:
            raise ConfigError("this file includes itself through `base:`", source=source, key="base")
        if self._files > MAX_FILES:
            raise ConfigError(f"more than {MAX_FILES} files are named by `base:`, one in the other", source=str(above[-1]), key="base")
        try:
            loaded = _parse(_text(path))
        except FileNotFoundError:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1)
            hint = f"; did you mean {path.parent / near[0]}?" if near else ""
            asked_by = f" (named in `base:` of {above[-1]})" if above else ""
            raise ConfigError(f"no such file{asked_by}{hint}", source=source) from None
        except (OSError, ValueError, yaml.reader.ReaderError) as error:
            raise ConfigError(f"cannot read it as a mapping of keys to values: {_first_line(error)}", source=source) from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" in line {mark.line + 1}" if mark else ""
            raise ConfigError(f"not valid YAML{line}: {getattr(error, 'problem', None) or _first_line(error)}", source=source) from error
        if not isinstance(loaded, dict | None):
            raise ConfigError("the top level must be a mapping of keys to values", source=source)
        return self._compose(loaded or {}, path, above, origins, "")

    def _compose(self, own: dict[str, Any], path: Path, above: tuple[Path, ...], origins: dict[str, str], key: str) -> dict[str, Any]:
        """`own` merged over the files of its `base:`; any mapping of a file may have one, with names relative to that file."""
        source = str(path)
        for name in own:
            if not isinstance(name, str):
                raise ConfigError(f"keys must be text, got {name!r}", source=source, key=key)
        own = dict(own)
        bases = own.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError("expected a file name or a list of file names", source=source, key=join(key, "base"))
        values: dict[str, Any] = {}
        for base in bases:
            below: dict[str, str] = {}
            _merge(values, self.read(path.parent / base, (*above, path.resolve()), below))
            origins.update({join(key, name): file for name, file in below.items()})
        for name, value in own.items():
            origins[join(key, name)] = source
            if isinstance(value, dict):
                own[name] = self._compose(value, path, above, origins, join(key, name))
        _merge(values, own)
        return values


def _text(path: Path) -> str:
    """Raises OSError, and ValueError for what cannot be a configuration."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise ValueError("it is not a regular file; name a YAML file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB; is it a configuration?")
    return data.decode()


def _parse(text: str) -> Any:
    """What the YAML holds, in plain containers. Raises yaml.YAMLError, and ValueError when it is larger or deeper than any configuration.

    The events are looked at first, in one pass without recursion, since what makes values of them recurses in C.
    """
    values, unfinished = 0, list[tuple[str | None, int]]()
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=_PARSER):
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                unfinished.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = unfinished.pop()
            sizes[anchor] = values - before + 1
        if values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values, aliases written out; shorten it")
        if len(unfinished) > MAX_DEPTH:
            raise ValueError(f"mappings and lists are nested more than {MAX_DEPTH} deep; flatten them")
    try:
        return get_yaml_loader(max_yaml_expanded_nodes=None)(text).get_single_data()
    except (LookupError, AttributeError, OverflowError) as error:  # whatever comes of `!!bool maybe`, `!!timestamp x`, 59:59...59.5
        raise ValueError(f"a value is not of its type ({type(error).__name__}: {_first_line(error)}); correct it, or quote it") from error


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
        yield join(key, name), not isinstance(value, Mapping)
        if isinstance(value, Mapping):
            yield from _keys(value, join(key, name))


# --- interpolation ----------------------------------------------------------------------------------------------------------


def environment(value: Any, missing: Callable[[str], Exception]) -> Any:
    """A plain value with `${oc.env:NAME}` and `${oc.env:NAME,default}` replaced by the environment's texts, wherever they stand in it.

    Raises missing(message) for a variable that is not set and has no default.
    """

    def read(match: re.Match[str]) -> str:
        name, default = match[1].strip(), match[2]
        found = os.environ.get(name, None if default is None else default.strip())
        if found is None:
            raise missing(f"the environment variable {name} is not set; export it, or write ${{oc.env:{name},DEFAULT}}")
        return found

    return _map_texts(value, lambda text: _ENVIRONMENT.sub(read, text))


def reads_environment(value: Any) -> bool:
    """Whether a plain value holds `${oc.env:...}`."""
    if isinstance(value, Mapping):
        return any(map(reads_environment, value.values()))
    return any(map(reads_environment, value)) if isinstance(value, list) else isinstance(value, str) and bool(_ENVIRONMENT.search(value))


def variables(value: Any) -> list[str]:
    """The names of the environment's variables that a plain value needs: those of `${oc.env:NAME}`, sorted."""
    found: set[str] = set()

    def note(text: str) -> str:
        found.update(match[1].strip() for match in _ENVIRONMENT.finditer(text) if match[2] is None)
        return text

    _map_texts(value, note)
    return sorted(found)


def _interpolated(document: Document) -> dict[str, Any]:
    """The document's values with every interpolation resolved but those of the environment: what those give must not be saved or shown."""
    hidden = _map_texts(document.values, lambda text: _ENVIRONMENT.sub(lambda match: f"\0{match[0][2:-1]}\0", text))
    try:
        _check_interpolations(document)
        resolved = OmegaConf.to_container(OmegaConf.create(hidden), resolve=True)
    except OmegaConfBaseException as error:
        raise document.error(str(error.full_key or ""), _first_line(error)) from error
    return cast(dict[str, Any], _map_texts(resolved, lambda text: _HIDDEN.sub(r"${\1}", text)))


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map_texts(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


Place = tuple[str | int, ...]


def _check_interpolations(document: Document) -> None:
    """Raises ConfigError when interpolations are none of ours, or would expand to more than any configuration holds."""
    costs: dict[Place, int] = {}

    def cost(place: Place, value: Any) -> int:
        """Characters of the value when all that it refers to is copied into it."""
        if place in costs:
            return costs[place]
        costs[place] = total = 0  # met again within itself: a circle, of which OmegaConf tells
        if len(place) > MAX_DEPTH:
            raise document.error(_dotted(place[:3]), f"mappings and lists are nested more than {MAX_DEPTH} deep; flatten them")
        if isinstance(value, Mapping):
            total = sum(cost((*place, name), item) for name, item in value.items())
        elif isinstance(value, list):
            total = sum(cost((*place, index), item) for index, item in enumerate(value))
        elif isinstance(value, str):
            total = len(value)
            if found := _CONTROL.search(value):
                raise document.error(_dotted(place), f"a text holds the control character {found[0]!a}; remove it")
            for target in _targets(document, place, value):
                total += _REFERENCE_COST + (cost(*target) if target is not None else 0)
        elif isinstance(value, int) and value.bit_length() > 63:
            raise document.error(_dotted(place), "whole numbers end at 2^63; lower it")
        if total > MAX_EXPANDED:
            raise document.error(_dotted(place), f"interpolations expand to more than {MAX_EXPANDED:,} characters; write the value out")
        costs[place] = total
        return total

    try:
        cost((), document.values)
    except RecursionError:
        raise document.error("", "too many interpolations refer to one another; write some of the values out") from None


def _targets(document: Document, place: Place, text: str) -> Iterable[tuple[Place, Any] | None]:
    """Where each interpolation in the text at `place` points and what is there; None where that is nothing of this document."""
    found = list(_INTERPOLATION.finditer(text))
    if len(found) != text.count("${"):
        raise document.error(_dotted(place), f"cannot read the interpolation in {text[:80]!r}; there are ${{key}}, ${{output:STAGE}} "
                             "and ${oc.env:NAME}")  # fmt: skip
    for match in found:
        dots, key = match["dots"], "output" if match["key"] is None else match["key"]
        base: Place = place[: len(place) - len(dots)] if dots else ()
        yield _look_up(document, place, (*base, *re.findall(r"[\w-]+", key)))


def _look_up(document: Document, place: Place, target: Place) -> tuple[Place, Any] | None:
    value: Any = document.values
    found: Place = ()
    for part in target:
        if isinstance(value, str) and "${" in value:
            raise document.error(_dotted(place), f"an interpolation cannot reach into another one's result; {_dotted(found)} is one")
        if isinstance(value, list):
            part = int(part) if str(part).isdecimal() else -1
            if not 0 <= part < len(value):
                return None
        elif not isinstance(value, Mapping) or part not in value:
            return None
        value, found = value[part], (*found, part)
    return found, value


def _dotted(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
