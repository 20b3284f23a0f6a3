"""A pipeline of diffusers as it lies in a directory or on the hub."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from gentrain.models.hub import fetched, files_of

INDEX = "model_index.json"
_REMEDY = (
    "name a directory that save_pretrained of a diffusers pipeline wrote, or a repository on the hub, and in `subfolder` the folder of it "
    "where the pipeline lies in one"
)
_SHOWN = 5  # folders in a message
SNAPSHOT = "snapshot_download"  # of huggingface_hub
_LIBRARIES = ("diffusers", "transformers")  # whose classes are loaded; a repository's own code never is
_to_come: ContextVar[tuple[Path, ...]] = ContextVar("directories that the recipe being read will write", default=())
_WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor", "image_processor")  # ends or begins the name of what has no weights


class Source:
    """Reads model_index.json, configurations, and components when they are asked for, with float32 weights, from safetensors only.

    Args:
        directory: local, or the name of a repository on the hub.
        revision: of the repository; None = its main branch. variant: of the files, such as "fp16"; None = the plain ones.
        subfolder: of the directory or repository, in which the pipeline lies, with slashes; None = the pipeline is all of it.

    Every function raises ValueError, which names the file and the remedy.
    """

    def __init__(self, directory: str, revision: str | None = None, variant: str | None = None, subfolder: str | None = None):
        self.directory, self.revision, self.variant, self.subfolder = directory, revision, variant, subfolder
        if subfolder is not None and (PurePosixPath(subfolder).is_absolute() or {"..", "."} & {*subfolder.split("/")} or not subfolder):
            raise ValueError(f"subfolder {subfolder!r} is no folder in {directory}; write its path from there, such as models/base")
        if self.is_local and revision is not None:
            raise ValueError(f"{directory} is a directory, which has no revisions; leave out `revision`")
        if self.is_local and not self._root.is_dir():
            raise ValueError(f"{directory} has no folder {subfolder}, which `subfolder` names; {self._pipelines_within()}")
        if not self.is_local and Path(directory).exists():
            raise ValueError(f"{directory} is a file; convert it with from_single_file and save_pretrained of diffusers; {_REMEDY}")
        if not self.is_local and (directory.startswith((".", "/")) or directory.count("/") > 1):
            raise ValueError(f"there is no directory {directory}; {_REMEDY}")

    @property
    def name(self) -> str:
        """For messages, and a path where it is local."""
        return self.directory if self.subfolder is None else f"{self.directory}/{self.subfolder}"

    @property
    def call(self) -> str:
        """Python: the arguments with which from_pretrained of a pipeline loads it; it may begin with SNAPSHOT."""
        revision = "" if self.revision is None else f", revision={json.dumps(self.revision)}"
        if self.is_local or self.subfolder is None:
            return f"{json.dumps(self.name, ensure_ascii=False)}{revision}"
        repository, patterns = json.dumps(self.directory), json.dumps(f"{glob.escape(self.subfolder)}/*")
        return f"{SNAPSHOT}({repository}{revision}, allow_patterns={patterns}) + {json.dumps(f'/{self.subfolder}')}"

    @property
    def is_local(self) -> bool:
        return Path(self.directory).is_dir()

    @property
    def _root(self) -> Path:
        """Of a local one."""
        return Path(self.directory, self.subfolder or "")

    def _pipelines_within(self) -> str:
        near = (path for depth in ("*", "*/*") for path in Path(self.directory).glob(f"{depth}/{INDEX}"))  # no further: it may be a disk
        found = sorted(path.parent.relative_to(self.directory).as_posix() for path in near)
        return f"pipelines lie in {', '.join(found[:_SHOWN])}" if found else _REMEDY

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        index = self.read(INDEX)
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(f"{self.name}/{INDEX} names no pipeline of diffusers itself (_class_name: {index.get('_class_name')!r})")
        return index

    def read(self, file: str) -> dict[str, Any]:
        """A JSON file of the pipeline, such as unet/config.json."""
        try:
            content = json.loads((self._folder((file,)) / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            remedy = f"{self._pipelines_within()}; set `subfolder`" if file == INDEX and self.is_local and not self.subfolder else _REMEDY
            raise ValueError(f"{self.name}/{file} cannot be read ({_brief(error)}); {remedy}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.name}/{file} holds no mapping; download the pipeline anew")
        return content

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration, with its class' defaults for what older versions of the library did not write."""
        cls, said = self.component_class(component), self.read(f"{component}/config.json")
        parameters = inspect.signature(cls.__init__).parameters.items()
        return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty} | said

    def _folder(self, patterns: Sequence[str], without: Sequence[str] = ()) -> Path:
        """Where the pipeline lies on this machine, after those of its files that match, `without` aside, were fetched from the hub."""
        if self.is_local:
            return self._root
        within = "" if self.subfolder is None else f"{glob.escape(self.subfolder)}/"
        wanted, unwanted = (tuple(f"{within}{pattern}" for pattern in each) for each in (patterns, without))
        return fetched(self.directory, self.revision, wanted, unwanted) / (self.subfolder or "")

    def digest(self, components: Sequence[str]) -> str:
        """SHA-256 that tells these components from others: of their files, or of the repository's commit."""
        digest = hashlib.sha256()
        root = self._folder((INDEX,))
        if not self.is_local:
            commit = root.parents[len(PurePosixPath(self.subfolder).parts) - 1] if self.subfolder else root
            digest.update(f"{self.name} {commit.name} {self.variant}".encode())
            return digest.hexdigest()
        for file in sorted(path for component in components for path in (root / component).rglob("*") if path.is_file()):
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if file.name == "config.json" and "_name_or_path" in (config := json.loads(file.read_text(encoding="utf-8"))):
                del config["_name_or_path"]  # where it was loaded from: diffusers adds it as it saves a copy
                found = hashlib.sha256(f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode()).hexdigest()
            digest.update(f"{file.relative_to(root)} {found}\n".encode())
        if self.variant is not None:  # which of them are read
            digest.update(self.variant.encode())
        return digest.hexdigest()

    def component_class(self, component: str) -> Any:
        """The class that model_index.json names for a component. Raises ValueError when it is missing or foreign."""
        library, name = (*(self.index.get(component) or ()), None, None)[:2]
        if library is None or name is None:
            present = ", ".join(key for key, value in self.index.items() if isinstance(value, list) and value[0])
            raise ValueError(f"the pipeline in {self.name} has no {component}, only {present}; complete it, or name another")
        cls = getattr(import_module(library), name, None) if library in _LIBRARIES else None
        if not hasattr(cls, "from_pretrained"):
            known = " or ".join(_LIBRARIES)
            raise ValueError(f"{component} of the pipeline in {self.name} is {library}.{name}, no class of this version of {known}")
        return cls

    def load(self, component: str) -> Any:
        """The component, with all its weights where it has some, all of them finite."""
        return self._load(component, self.variant)

    def _load(self, component: str, variant: str | None) -> Any:
        with torch.device("cpu"), _telling(f"{component} of the pipeline in {self.name}"):
            cls = self.component_class(component)
            place = {"subfolder": component, "local_files_only": True}
            folder = self._folder(*files_of(component, variant))
            if _weightless(component):
                return cls.from_pretrained(folder, **place)
            weights = {"dtype": torch.float32, "use_safetensors": True, "variant": variant}
            made, told = cls.from_pretrained(folder, **place, **weights, output_loading_info=True)
            parameters = dict(made.named_parameters())
            if missing := sorted(parameters.keys() & told["missing_keys"]):  # which the libraries would draw at random
                raise ValueError(f"its files lack {len(missing)} of {len(parameters)} weights, such as {missing[0]}")
            if damaged := next((name for name, p in parameters.items() if not p.isfinite().all()), None):
                raise ValueError(f"its weights {damaged} are not finite")
            return made

    def skeleton(self, component: str) -> Any:
        """The component as its configuration says, without its weights: of use on the meta device."""
        cls, config = self.component_class(component), self.read(f"{component}/config.json")
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))

    def pipeline(self, **components: Any) -> Any:
        """The pipeline with its own components but those given; None leaves one out."""
        import diffusers

        cls = getattr(diffusers, self.index["_class_name"])
        needed = [key for key, value in self.index.items() if isinstance(value, list) and value[0] and key not in components]
        plain: list[str] = []
        with torch.device("cpu"), _quiet(), _telling(f"the pipeline in {self.name}"):
            folder = self._parts(needed, self.variant)
            if self.variant is not None:  # of components that have no others
                plain = [key for key in needed if not any((folder / key).glob(f"*.{self.variant}*"))]
                folder = self._parts(plain, None)
        if missing := [key for key in needed if not (folder / key).is_dir()]:
            raise ValueError(f"{self.name} has no folder {missing[0]}, which its {INDEX} names; download the pipeline anew")
        weighty = [key for key in needed if self.index[key][0] in _LIBRARIES and not _weightless(key)]
        own = {key: self._load(key, None if key in plain else self.variant) for key in weighty}
        with torch.device("cpu"), _quiet(), _telling(f"the pipeline in {self.name}"):
            return cls.from_pretrained(folder, variant=self.variant, dtype=torch.float32, use_safetensors=True, **own, **components)

    def _parts(self, components: Sequence[str], variant: str | None) -> Path:
        """`_folder` with these components."""
        found = [files_of(component, variant) for component in components]
        return self._folder([INDEX, *(each for wanted, _ in found for each in wanted)], [each for _, left in found for each in left])


@contextlib.contextmanager
def outputs_to_come(directories: Sequence[Path]) -> Iterator[None]:
    """Within it a pipeline in one of these may be missing still: a recipe is read before its first stage runs."""
    token = _to_come.set(tuple(directory.absolute() for directory in directories))
    try:
        yield
    finally:
        _to_come.reset(token)


def is_to_come(directory: str) -> bool:
    """Whether a stage of the recipe that is being read will write it, or something below it."""
    return any(Path(directory).absolute().is_relative_to(known) for known in _to_come.get())


def _weightless(component: str) -> bool:
    return any(word in component for word in _WEIGHTLESS)


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # constructors of the libraries, given what a file says: anything may come of it
        raise ValueError(
            f"{what} cannot be loaded ({_brief(error)}); only safetensors are read: download them anew, or correct `variant`"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' words about components that were left out on purpose."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
