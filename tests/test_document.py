"""Values of the environment: used, but neither saved nor shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import PositiveInt

from gentrain.config import Component, ConfigError, Document, build, load, option, register, to_dict, to_yaml

CANARY = "canary-7c1e"


class Store(Component, kind="store"):
    pass


Store._package = "json"  # the stores are all in this file: any package that is cheap to import will do


@register("bucket")
@dataclass
class Bucket(Store):
    url: str
    parts: PositiveInt = 1
    token: str | None = None
    tags: dict[str, Any] = option(dict)

    def __post_init__(self) -> None:
        if self.url.startswith("http:"):
            raise ValueError(f"{self.url} is not encrypted; use https")
        if self.token == "ab12":
            raise ConfigError(f"the token {self.token} has expired", key="token")


@dataclass
class Backup:
    stores: list[Store]
    main: Store | None = None
    times: list[float] = option(list)
    title: str = ""


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKEN": CANARY, "PARTS": "7", "TIME": "1.5", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ABSENT", raising=False)


def backup(folder: Path, text: str, *overrides: str) -> Backup:
    (folder / "main.yaml").write_text(text)
    return build(Backup, load(folder / "main.yaml", overrides))


TEXT = """
stores: [{name: bucket, url: 's3://${oc.env:TOKEN}/a', parts: '${oc.env:PARTS}', token: '${oc.env:TOKEN}'}]
main: {name: bucket, url: here, tags: {a: [1, '${oc.env:TOKEN}'], b: '${title}'}}
times: [1, '${oc.env:TIME}']
title: '${oc.env:ABSENT,none given} ${main.url}'
"""


def test_values_are_used_and_their_names_saved(tmp_path: Path) -> None:
    loaded = backup(tmp_path, TEXT)
    assert loaded == Backup(
        [Bucket(f"s3://{CANARY}/a", 7, CANARY)],
        Bucket("here", tags={"a": [1, CANARY], "b": "none given here"}),
        [1.0, 1.5],
        "none given here",
    )
    saved = to_yaml(loaded)
    assert CANARY not in saved and "1.5" not in saved and "7" not in saved
    assert to_dict(loaded)["stores"][0] == {
        "name": "bucket", "url": "s3://${oc.env:TOKEN}/a", "parts": "${oc.env:PARTS}", "token": "${oc.env:TOKEN}", "tags": {},
    }  # fmt: skip
    assert to_dict(loaded)["main"]["tags"] == {"a": [1, "${oc.env:TOKEN}"], "b": "${oc.env:ABSENT,none given} here"}
    again = backup(tmp_path, saved)
    assert again == loaded and to_yaml(again) == saved
    assert build(Store, Document(to_dict(loaded.stores[0]), "elsewhere")) == loaded.stores[0], "as actors get it"


def test_overrides_may_name_variables_so_that_no_value_stands_in_a_command(tmp_path: Path) -> None:
    loaded = backup(tmp_path, "stores: []\n", "main={name: bucket, url: a}", "main.token=${oc.env:TOKEN}", "title=${main.token}")
    assert loaded.main == Bucket("a", token=CANARY) and loaded.title == CANARY
    assert CANARY not in to_yaml(loaded)


def test_a_variable_is_read_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = load(None, ["url=a", "token=${oc.env:TOKEN}"])
    monkeypatch.setenv("TOKEN", "another one")
    assert build(Bucket, document).token == "another one"


@pytest.mark.parametrize(
    "text, key, message",
    [
        ("title: ${oc.env:ABSENT}\n", "title", "the environment variable ABSENT is not set; export it, or write ${oc.env:ABSENT,DEFAULT}"),
        ("times: ['${oc.env:TOKEN}']\n", "times[0]", "expected a list, each a number, got ['${oc.env:TOKEN}'] ("),
        ("main: {name: bucket, url: a, parts: '${oc.env:TOKEN}'}\n", "main.parts", "expected a whole number > 0, got '${oc.env:TOKEN}' ("),
        ("main: {name: bucket, url: 'http://${oc.env:TOKEN}'}\n", "main", "http://${oc.env:TOKEN} is not encrypted; use https"),
        ("main: {name: bucket, url: a, token: '${oc.env:OLD}'}\n", "main.token", "the token ${oc.env:OLD} has expired"),
        ("main: {name: bucket, url: a, toke: '${oc.env:TOKEN}'}\n", "main.toke", "unknown key"),
        ("main: '${oc.env:TOKEN}'\n", "main.name", "no store is called '${oc.env:TOKEN}'"),
    ],
)
def test_no_message_shows_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str, message: str) -> None:
    monkeypatch.setenv("OLD", "ab12")
    with pytest.raises(ConfigError) as caught:
        backup(tmp_path, "stores: []\n" + text)
    assert caught.value.key == key and message in caught.value.message
    assert CANARY not in str(caught.value)
