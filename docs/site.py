"""What the site holds beside docs/: a page for each registry, from its dataclasses, and the files of the repository that pages link to."""

from __future__ import annotations

import dataclasses
import html
import inspect
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gentrain.catalogue import default_of, kinds
from gentrain.config import describe

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while pages:  # those that come in have links of their own
        uri = pages.pop()
        for path in _linked(uri, (ROOT / _repository(uri)).read_text()):
            if not path.startswith("docs/") and files.get_file_from_path(path) is None and (ROOT / path).is_file():
                files.append(File.generated(config, path, content=(ROOT / path).read_bytes()))
                pages += [path] if path.endswith(".md") else []
    for kind, entries in kinds().items():
        files.append(File.generated(config, f"reference/{kind.replace(' ', '_')}.md", content="\n".join(_reference(kind, entries))))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """docs/ is the site's root; what lies beside it in the repository lies within it there."""
    uri = page.file.src_uri
    return LINK.sub(lambda match: posixpath.relpath(_target(uri, match[0]).removeprefix("docs/"), posixpath.dirname(uri) or "."), markdown)


def _repository(uri: str) -> str:
    return f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri


def _target(uri: str, link: str) -> str:
    """The path, in the repository, of what a page links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_repository(uri)), link))


def _linked(uri: str, text: str) -> Iterator[str]:
    return (_target(uri, link) for link in LINK.findall(text))


def _reference(kind: str, entries: typing.Mapping[str, type[Any]]) -> Iterator[str]:
    yield f"# Reference: {kind}\n\nWhat `{kind}` can be, with every field, as `gentrain methods NAME` prints it.\n"
    for name, component in entries.items():
        yield f"## {name}\n\n```text\n{inspect.cleandoc(component.__doc__ or '')}\n```\n"
        fields, hints = dataclasses.fields(component), typing.get_type_hints(component, include_extras=True)
        yield "| field | type | default | unit | what it is | source |\n|---|---|---|---|---|---|" if fields else "It has no fields."
        for field in fields:
            unit, help, source = (field.metadata.get(key, "") for key in ("unit", "help", "source"))
            row = (field.name, describe(hints[field.name]), default_of(field), unit, help, source)
            yield f"| {' | '.join(map(_cell, row))} |"
        yield ""


def _cell(text: str) -> str:
    return html.escape(re.sub(r"([|*_`\[\]\\])", r"\\\1", text), quote=False)
