"""A pipeline of diffusers as it lies in a directory or on the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gentrain.models.hub import fetched, files_of

INDEX = "model_index.json"
_REMEDY = "name a directory that save_pretrained of a diffusers pipeline wrote, or a repository on the hub"
_LIBRARIES = ("diffusers", "transformers")  # whose classes are loaded; a repository's own code never is
_to_come: ContextVar[tuple[Path, ...]] = ContextVar("directories that the recipe being read will write", default=())
_WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor", "image_processor")  # ends or begins the name of what has no weights


class Source:
    """Reads model_index.json, configurations, and components when they are asked for, with float32 weights, from safetensors only.

    Args:
        directory: local, or the name of a repository on the hub.
        revision: of the repository; None = its main branch. variant: of the files, such as "fp16"; None = the plain ones.

    Every function raises ValueError, which names the file and the remedy.
    """

    def __init__(self, directory: str, revision: str | None = None, variant: str | None = None):
        self.directory, self.revision, self.variant = directory, revision, variant
        if self.is_local and revision is not None:
            raise ValueError(f"{directory} is a directory, which has no revisions; leave out `revision`")
        if not self.is_local and Path(directory).exists():
            raise ValueError(f"{directory} is a file; convert it with from_single_file and save_pretrained of diffusers; {_REMEDY}")
        if not self.is_local and directory.startswith((".", "/")):
            raise ValueError(f"there is no directory {directory}; {_REMEDY}")

    @property
    def is_local(self) -> bool:
        return Path(self.directory).is_dir()

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        index = self.read(INDEX)
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(f"{self.directory}/{INDEX} names no pipeline of diffusers itself (_class_name: {index.get('_class_name')!r})")
        return index

    def read(self, file: str) -> dict[str, Any]:
        """A JSON file of the pipeline, such as unet/config.json."""
        try:
            content = json.loads(self._local(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.directory}/{file} cannot be read ({_brief(error)}); {_REMEDY}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.directory}/{file} holds no mapping; download the pipeline anew")
        return content

    def _local(self, file: str) -> Path:
        if self.is_local:
            return Path(self.directory, file)
        return fetched(self.directory, self.revision, (file,)) / file

    def digest(self, components: Sequence[str]) -> str:
        """SHA-256 that tells these components from others: of their files, or of the repository's commit."""
        digest = hashlib.sha256()
        if not self.is_local:
            digest.update(f"{self.directory} {self._local(INDEX).parent.name} {self.variant}".encode())
            return digest.hexdigest()
        for file in sorted(path for component in components for path in Path(self.directory, component).rglob("*") if path.is_file()):
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if file.name == "config.json" and "_name_or_path" in (config := json.loads(file.read_text(encoding="utf-8"))):
                del config["_name_or_path"]  # where it was loaded from: diffusers adds it as it saves a copy
                found = hashlib.sha256(f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode()).hexdigest()
            digest.update(f"{file.relative_to(self.directory)} {found}\n".encode())
        return digest.hexdigest()

    def component_class(self, component: str) -> Any:
        """The class that model_index.json names for a component. Raises ValueError when it is missing or foreign."""
        library, name = (*(self.index.get(component) or ()), None, None)[:2]
        if library is None or name is None:
            present = ", ".join(key for key, value in self.index.items() if isinstance(value, list) and value[0])
            raise ValueError(f"the pipeline in {self.directory} has no {component}, only {present}; complete it, or name another")
        cls = getattr(import_module(library), name, None) if library in _LIBRARIES else None
        if not hasattr(cls, "from_pretrained"):
            known = " or ".join(_LIBRARIES)
            raise ValueError(f"{component} of the pipeline in {self.directory} is {library}.{name}, no class of this version of {known}")
        return cls

    def load(self, component: str) -> Any:
        """The component with its weights."""
        weights = {} if any(word in component for word in _WEIGHTLESS) else {
            "dtype": torch.float32, "use_safetensors": True, "variant": self.variant,
        }  # fmt: skip
        with torch.device("cpu"), _telling(f"{component} of the pipeline in {self.directory}"):
            cls = self.component_class(component)
            if not self.is_local:
                fetched(self.directory, self.revision, *files_of(component, self.variant))
            return cls.from_pretrained(self.directory, subfolder=component, revision=self.revision, local_files_only=True, **weights)

    def skeleton(self, component: str) -> Any:
        """The component as its configuration says, without its weights: of use on the meta device."""
        cls, config = self.component_class(component), self.read(f"{component}/config.json")
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))

    def pipeline(self, **components: Any) -> Any:
        """The pipeline with its own components but those given; None leaves one out."""
        import diffusers

        cls = getattr(diffusers, self.index["_class_name"])
        needed = [key for key, value in self.index.items() if isinstance(value, list) and value[0] and key not in components]
        if missing := [key for key in needed if self.is_local and not Path(self.directory, key).is_dir()]:
            raise ValueError(f"{self.directory} has no folder {missing[0]}, which its {INDEX} names; download the pipeline anew")
        with torch.device("cpu"), _quiet(), _telling(f"the pipeline in {self.directory}"):
            return cls.from_pretrained(
                self.directory, revision=self.revision, variant=self.variant, dtype=torch.float32, use_safetensors=True, **components
            )


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


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
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
