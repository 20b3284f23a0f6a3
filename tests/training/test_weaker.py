"""Autoguidance as configured: a sampler that names the run of a weaker model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gentrain.cluster.generation import CHUNK, generate
from gentrain.config import ConfigError
from gentrain.noise import Noise, derive
from gentrain.samplers.euler import Euler
from gentrain.samplers.guided import AutoGuided, Guided
from gentrain.samplers.heun import Heun
from gentrain.training.callbacks import MetricsFile, Previews
from gentrain.training.loop import train
from gentrain.training.roles import load_network
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import run_of, values

ALONE = World(0, 1, torch.device("cpu"))


def trained(output: Path, **changes: object) -> str:
    run = run_of(values(output, "flow_matching", samples=24) | {"model": {"name": "mlp", "width": 16}} | changes)
    save_config(run)
    train(run, ALONE, lambda: False, [MetricsFile, Previews])
    return str(output)


def test_a_run_is_drawn_from_away_from_a_weaker_one(tmp_path: Path) -> None:
    strong, weak = trained(tmp_path / "strong"), trained(tmp_path / "weak", seed=9, model={"name": "mlp", "width": 8})
    labels = torch.arange(6) % 3
    drawn = {weight: generate(strong, Guided(sampler=Heun(), steps=3, weak=weak, weak_weight=weight), labels) for weight in (1.0, 2.0)}
    alone = generate(strong, Heun(steps=3), labels)
    torch.testing.assert_close(drawn[1.0], alone, atol=1e-5, rtol=1e-4)
    assert (drawn[2.0] - alone).abs().max() > 1e-3
    denoiser, worse = load_network(strong)[0], load_network(weak)[0]
    noise = Noise(derive(0, "generate"), torch.arange(6))
    by_hand = Heun(steps=3).sample(AutoGuided(denoiser, worse, 2.0), (6, 2), noise, {"label": labels})
    torch.testing.assert_close(drawn[2.0], by_hand, atol=1e-5, rtol=1e-4)
    assert len(labels) < CHUNK


def test_a_weaker_model_of_something_else_is_refused(tmp_path: Path) -> None:
    strong, labels = trained(tmp_path / "strong"), torch.zeros(2, dtype=torch.int64)
    other_path = trained(tmp_path / "path", path="variance_preserving")
    other_data = trained(tmp_path / "data", data={"name": "rings", "rings": 2})
    for weak in (other_path, other_data):
        with pytest.raises(ConfigError, match=r"sampler\.weak: .* is of other data or another path than"):
            generate(strong, Guided(sampler=Euler(), steps=2, weak=weak), labels)
    student = trained(tmp_path / "student", method="consistency_training")
    with pytest.raises(ConfigError, match=r"sampler\.weak: .* holds a student of consistency_training, which euler does not draw from"):
        generate(strong, Guided(sampler=Euler(), steps=2, weak=student), labels)
    with pytest.raises(ConfigError, match="is not a run's directory"):
        generate(strong, Guided(sampler=Euler(), steps=2, weak=str(tmp_path / "nowhere")), labels)


def test_previews_are_drawn_so_too(tmp_path: Path) -> None:
    unet = {"data": "digits", "model": {"name": "unet", "channels": [8], "attention": []}}
    weak = trained(tmp_path / "weak", **unet)
    settings = values(tmp_path / "strong", "flow_matching", samples=24, preview_every=24, preview_count=4)
    run = run_of(settings | unet | {"sampler": {"name": "guided", "sampler": "euler", "steps": 2, "weak": weak}})
    save_config(run)
    train(run, ALONE, lambda: False, [Previews])
    assert (tmp_path / "strong/samples/000000000024.png").is_file() and run.sampler.weaker is not None  # type: ignore[attr-defined]


def test_who_forgets_to_load_it_is_told() -> None:
    from tests.methods.toy import TinyNetwork, nets_with

    run = run_of(values(Path("unused"), "flow_matching"))
    denoiser = nets_with(TinyNetwork(), run.path, "velocity").model
    with pytest.raises(ValueError, match="the weaker model somewhere has not been loaded"):
        Guided(sampler=Euler(), steps=2, weak="somewhere").sample(denoiser, (2, 2), Noise(0, torch.arange(2)))
