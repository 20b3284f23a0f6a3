"""Pairs of samples that a reward has judged: which is preferred, what is held out, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.preferences import Pairs
from gentrain.recipes.base import Stage
from gentrain.recipes.prefer import Prefer
from tests.methods.captioned import CaptionedPatches

DATA: Any = CaptionedPatches.registered_name
LEVELS = torch.tensor([[-0.8, 0.1, 0.5, -0.2, 0.3, 0.9], [0.2, 0.1, -0.5, -0.1, 0.2, -0.9]])  # of brightness, one row per set
LABEL = torch.tensor([4, 1, 30, 7, 2, 5])


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, str]:
    for name, levels in zip("ab", LEVELS, strict=True):
        (tmp_path / name).mkdir()
        x = levels.reshape(6, 1, 1, 1).expand(6, 3, 6, 6).contiguous()
        save_file({"x": x, "label": LABEL}, tmp_path / name / "samples.safetensors")
    return {name: str(tmp_path / name) for name in "ab"}


def stage(samples: dict[str, str], **settings: Any) -> Prefer:
    values = {"name": "prefer", "samples": samples, "reward": {"name": "brightness"}, "data": DATA, "held_out": 2, **settings}
    return build(Stage, Document(values, "x.yaml"))  # type: ignore[return-value, type-abstract]


def test_the_brighter_of_two_is_preferred_and_the_last_texts_are_held_out(samples: dict[str, str], tmp_path: Path) -> None:
    stage(samples, tie=0.1).execute(tmp_path / "out")
    settings = {"name": "preferences", "file": str(tmp_path / "out/pairs.safetensors"), "prompts": str(tmp_path / "out/prompts.txt")}
    data = build(Data, Document({**settings, "held_out": 1}, "x.yaml"))  # type: ignore[type-abstract]
    pairs = data.split("train")
    assert isinstance(pairs, Pairs) and len(data.split("held_out")) == 1
    assert pairs.preferred[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.1, 0.5])
    assert pairs.rejected[:, 0, 0, 0].tolist() == pytest.approx([-0.8, 0.1, -0.5])
    assert pairs.votes.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert pairs.caption is not None and [data.captions[place] for place in pairs.caption.tolist()] == [
        CaptionedPatches().captions[place] for place in (4, 1, 30)
    ]
    better, worse = (load_file(tmp_path / f"out/held_out/{name}/samples.safetensors") for name in ("preferred", "rejected"))
    assert better["label"].tolist() == worse["label"].tolist() == [5]  # 0.05 apart, that of text 2 is a tie
    assert (better["x"][0, 0, 0, 0].item(), worse["x"][0, 0, 0, 0].item()) == pytest.approx((0.9, -0.9))


def test_every_two_sets_make_pairs(samples: dict[str, str], tmp_path: Path) -> None:
    stage({**samples, "c": samples["a"]}).execute(tmp_path / "out")
    found = load_file(tmp_path / "out/pairs.safetensors")
    assert found["caption"].tolist() == LABEL[:4].tolist() * 3
    assert found["votes"][4:8, 2].tolist() == [1] * 4  # a beside itself


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"held_out": 6}, "samples", "more than 6 of them, got 6"),
        ({"tie": 1.0}, "tie", "all pairs that are held out are ties"),
        ({"weights": {"judge": "x"}}, "weights.judge", "reads no network of this name"),
        ({"reward": {"name": "towers"}}, "weights.towers", "name its run"),
    ],
)
def test_mistakes_are_named(samples: dict[str, str], settings: dict[str, Any], key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        stage(samples, **settings).execute(tmp_path / "out")
    assert error.value.key == key


def test_sets_that_do_not_belong_together_are_refused(samples: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two or more sets"):
        stage({"a": samples["a"]})
    found = load_file(Path(samples["b"]) / "samples.safetensors")
    save_file({**found, "label": LABEL.flip(0)}, Path(samples["b"]) / "samples.safetensors")
    with pytest.raises(ConfigError, match="b and a were not drawn for the same texts"):
        stage(samples).execute(tmp_path / "out")
