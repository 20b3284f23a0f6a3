"""Which prompts are to be forgotten, what is drawn in their place, and which stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.concepts import Concept, Concepts
from gentrain.data.prompts import Prompts

LINES = ["a cat", "two Cats", "a catalogue", "a dog", "a bus", "cat and kitten", "bloody Mary"]


def prompts(folder: Path, lines: list[str] = LINES) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(lines))
    return Prompts(str(folder / "prompts.txt"), size=8)


def test_replace_maps_whole_words_in_any_case() -> None:
    concept = Concept(["cat", "cats", "kitten"], replace="dog")
    assert not concept.names("bobcat") and not concept.names("catnip") and concept.names("a CAT!")
    assert concept.pairs(LINES) == [("a cat", "a dog"), ("two Cats", "two dog"), ("cat and kitten", "dog and dog")]
    assert Concept(["cat (1)", "cat"], replace=r"\\1 dog").pairs(["a cat (1)!"]) == [("a cat (1)!", r"a \\1 dog!")]  # neither is a pattern


def test_append_puts_the_words_before_and_behind_prompts_that_lack_them() -> None:
    concept = Concept(["bloody", "torn"], append=True)
    assert concept.pairs(["a bus", "bloody Mary"]) == [
        ("a bus bloody", "a bus"), ("bloody a bus", "a bus"), ("a bus torn", "a bus"), ("torn a bus", "a bus")
    ]  # fmt: skip


def test_rows_pair_what_is_forgotten_with_what_is_drawn_instead_and_the_rest_stays(tmp_path: Path) -> None:
    concepts = {"cat": Concept(["cat", "cats", "kitten"], replace="dog"), "gore": Concept(["bloody"], append=True)}
    data = Concepts(prompts(tmp_path), concepts)
    batch = data.split("train").batch(torch.arange(4000))
    told = {part: [data.captions[place] for place in batch[part].tolist()] for part in ("caption", "forget/caption", "override/caption")}
    assert set(told["caption"]) == {"a catalogue", "a dog", "a bus"}
    pairs = list(zip(told["forget/caption"], told["override/caption"], strict=True))
    replaced = {("a cat", "a dog"), ("two Cats", "two dog"), ("cat and kitten", "dog and dog")}
    appended = {pair for text in ("a catalogue", "a dog", "a bus") for pair in ((f"{text} bloody", text), (f"bloody {text}", text))}
    assert set(pairs) == replaced | appended  # a cat with blood would be drawn as a cat, which is to be forgotten as well
    share = sum(pair in replaced for pair in pairs) / len(pairs)
    assert share == pytest.approx(0.5, abs=0.03)  # concepts alike, whatever the number of their prompts
    assert pairs.count(("a cat", "a dog")) / len(pairs) == pytest.approx(1 / 6, abs=0.03)
    assert batch["x"].shape == (4000, 3, 8, 8) and not batch["x"].any() and "negative/caption" not in batch
    again = data.split("train")[17]
    assert all(torch.equal(value, batch[key][17]) for key, value in again.items())


def test_negatives_belong_to_their_concept(tmp_path: Path) -> None:
    concepts = {"cat": Concept(["cat"], replace="dog", negative="fur"), "bus": Concept(["bus"], replace="van")}
    data = Concepts(prompts(tmp_path), concepts)
    batch = data.split("train").batch(torch.arange(200))
    found = {(data.captions[f], data.captions[n]) for f, n in zip(batch["forget/caption"].tolist(), batch["negative/caption"].tolist())}
    assert found == {("a cat", "fur"), ("cat and kitten", "fur"), ("a bus", "")}


@pytest.mark.parametrize(
    "concept, said",
    [
        ({"words": []}, "words: name the words"),
        ({"words": [" "]}, "words: name the words"),
        ({"words": ["cat"]}, "replace: give one rule"),
        ({"words": ["cat"], "replace": "dog", "append": True}, "replace: give one rule"),
        ({"words": ["cat"], "replace": "a Cat"}, "replace: 'a Cat' names the concept itself"),
    ],
)
def test_a_concept_has_words_and_one_rule(concept: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Concept(**concept)


@pytest.mark.parametrize(
    "concepts, lines, said",
    [
        ({"cow": Concept(["cow"], replace="dog")}, LINES, r"no prompt is left to forget for the concept 'cow' \(words: cow\)"),
        (
            {"a": Concept(["cat"], replace="dog"), "b": Concept(["dog"], replace="cat")},
            LINES,
            "no prompt is left to forget for the concept 'a'",
        ),
        ({"cat": Concept(["cat"], replace="dog")}, ["a cat"], "every prompt names a concept to forget"),
    ],
)
def test_prompts_that_do_not_do_are_refused(tmp_path: Path, concepts: dict[str, Concept], lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Concepts(prompts(tmp_path, lines), concepts).fit()


def test_without_concepts_there_is_nothing_to_forget(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="concepts: name at least one"):
        Concepts(prompts(tmp_path), {})
