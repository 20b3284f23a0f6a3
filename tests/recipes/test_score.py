"""Rewards as metrics: means, texts of others, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.models.base import Model
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import own_samples, read_metrics
from gentrain.recipes.score import Score, _moved
from gentrain.training.given import refuse_other_law
from gentrain.training.loop import Outcome, train
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World
from tests.methods.captioned import CaptionedPatches


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = {
        "method": {"name": "contrastive", "shift": 0},
        "data": CaptionedPatches.registered_name,
        "model": {"name": "towers", "width": 16, "channels": [8], "buckets": 256, "initial_bias": -3.3},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "engine": "torch",
        "training": {"samples": 640, "batch_size": 32, "log_every": 640},
        "output": str(tmp_path_factory.mktemp("towers") / "run"),
    }
    run = parse_run(Document(settings, "test"))
    save_config(run)
    assert train(run, World(0, 1, torch.device("cpu")), lambda: False) is Outcome.FINISHED
    return settings["output"]  # type: ignore[return-value]


@pytest.fixture
def samples(tmp_path: Path) -> str:
    (tmp_path / "drawn").mkdir()
    x = torch.linspace(-1, 1, 10).reshape(10, 1, 1, 1).expand(10, 3, 6, 6).contiguous()
    save_file({"x": x, "label": torch.arange(10)}, tmp_path / "drawn" / "samples.safetensors")
    return str(tmp_path / "drawn")


def stage(samples: Any, reward: Any, **settings: Any) -> Score:
    values = {
        "name": "score",
        "samples": samples if isinstance(samples, dict) else {"drawn": samples},
        "reward": reward,
        "data": CaptionedPatches.registered_name,
        **settings,
    }
    return build(Stage, Document(values, "x.yaml"))  # type: ignore[return-value, type-abstract]


def test_the_mean_of_a_closed_form_is_its_mean(samples: str, tmp_path: Path) -> None:
    stage(samples, {"name": "brightness"}).execute(tmp_path / "out")
    rows = {row["name"]: row for row in read_metrics(tmp_path / "out")}
    assert set(rows) == {"brightness, drawn", "brightness, held-out data"}  # brightness reads no text
    drawn = rows["brightness, drawn"]
    assert drawn["value"] == pytest.approx(0.5, abs=0.02) and drawn["low"] < 0.45 and drawn["high"] > 0.55
    assert "over 10 images" in drawn["definition"] and "range 0 to 1" in drawn["definition"]


def test_towers_find_the_own_text_nearer_than_anothers(samples: str, towers: str, tmp_path: Path) -> None:
    model = {"width": 16, "channels": [8], "buckets": 256}
    scored = stage(samples, {"name": "towers", "model": model}, weights={"towers": towers})
    scored.execute(tmp_path / "out")
    rows = {row["name"]: row for row in read_metrics(tmp_path / "out")}
    own, other = rows["towers, held-out data"], rows["towers, held-out data, another's text"]
    assert own["low"] > other["high"] + 0.2  # never seen; seeds 0, 1, 2 of the towers: the intervals are 0.38 apart at least
    assert "of another's text" in other["definition"]


def test_sets_of_the_same_texts_are_compared_sample_by_sample(samples: str, tmp_path: Path) -> None:
    brighter = tmp_path / "brighter"
    brighter.mkdir()
    x = torch.linspace(-1, 0.9, 10).reshape(10, 1, 1, 1).expand(10, 3, 6, 6).contiguous()
    save_file({"x": x + 0.1, "label": torch.arange(10)}, brighter / "samples.safetensors")
    sets = {"first": samples, "second": str(brighter)}
    stage(sets, {"name": "brightness"}, against={"second": "first"}).execute(tmp_path / "out")
    rows = {row["name"]: row for row in read_metrics(tmp_path / "out")}
    row, above = rows["brightness, second less first"], rows["brightness, second above first"]
    assert row["value"] == pytest.approx(float((x[:, 0, 0, 0] + 0.1 - torch.linspace(-1, 1, 10)).mean()) / 2, abs=2e-3)
    assert row["high"] - row["low"] < 0.05  # that of either mean is 0.4 wide
    assert above["value"] == pytest.approx(float((x[:, 0, 0, 0] + 0.1 > torch.linspace(-1, 1, 10)).float().mean()))
    save_file({"x": x, "label": torch.arange(10).flip(0)}, brighter / "samples.safetensors")
    with pytest.raises(ConfigError, match="second and first were not drawn for the same texts"):
        stage(sets, {"name": "brightness"}, against={"second": "first"}).execute(tmp_path / "out")


def test_everybody_gets_a_label_of_another() -> None:
    label = torch.tensor([2, 0, 2, 1, 0, 1, 2, 0])
    assert (_moved(label) != label).all() and sorted(_moved(label).tolist()) == sorted(label.tolist())


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"reward": {"name": "towers"}}, "weights.towers", "the reward reads the network towers; name its run"),
        ({"reward": {"name": "brightness"}, "weights": {"judge": "x"}}, "weights.judge", "reads no network of this name; it reads: none"),
        ({"reward": {"name": "brightness"}, "samples": {}}, "samples", "expected at least one name"),
        ({"reward": {"name": "brightness"}, "against": {"drawn": "x"}}, "against.drawn", "'x' is none of the samples: drawn"),
        ({"reward": {"name": "classifier"}, "weights": {"judge": "x"}}, "reward", "needs data with classes"),
    ],
)
def test_mistakes_are_named(samples: str, settings: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        stage(**{"samples": samples, **settings})
    assert error.value.key == key


def test_labels_of_other_data_are_refused(samples: str, towers: str, tmp_path: Path) -> None:
    x = torch.zeros(2, 3, 6, 6)
    save_file({"x": x, "label": torch.tensor([0, 99])}, Path(samples) / "samples.safetensors")
    with pytest.raises(ConfigError, match="label 99 is none of the 36 of the data"):
        stage(samples, {"name": "brightness"}).execute(tmp_path / "out")


OTHERWISE = r"towers: .*/run was trained with towers of buckets: 256, and is read here with buckets: 128; make them equal"


def test_towers_that_would_be_read_otherwise_are_refused(samples: str, towers: str, tmp_path: Path) -> None:
    """Hashed to other numbers the texts would be other texts, though every shape fits."""
    reward = {"name": "towers", "model": {"width": 16, "channels": [8], "buckets": 128}}
    with pytest.raises(ConfigError, match=r"weights\." + OTHERWISE):
        stage(samples, reward, weights={"towers": towers}).execute(tmp_path / "out")
    settings = {
        "method": {"name": "draft", "reward": reward, "sampler": {"name": "ddim", "steps": 2, "eta": 1}},
        "data": CaptionedPatches.registered_name,
        "path": "variance_preserving",
        "model": {"name": "unet", "channels": [8], "attention": []},
        "engine": "torch",
        "training": {"samples": 8, "batch_size": 4},
        "roles": {"model": {"weights": "nowhere"}, "towers": {"weights": towers}},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(ConfigError, match=r"roles\.towers\.weights: .*/run was trained with towers of buckets: 256"):
        refuse_other_law(parse_run(Document(settings, "test")), "towers")


def test_towers_draw_nothing_that_could_be_evaluated(towers: str) -> None:
    with pytest.raises(ConfigError, match="holds a contrastive, which draws nothing that could be compared; measure it with the stage"):
        own_samples(Path(towers), Path(towers) / "generated")


def test_a_temperature_that_the_loss_clips_is_refused() -> None:
    assert build(Model, Document({"name": "towers", "initial_scale": 4.6}, "test"))
    with pytest.raises(ConfigError, match=r"initial_scale: expected a number <= 4\.605"):
        build(Model, Document({"name": "towers", "initial_scale": 4.61}, "test"))
