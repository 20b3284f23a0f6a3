"""A ControlNet that jdm teaches a one-step student of a pipeline, drawn by diffusers alone as its card says."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError, Document
from gentrain.models.control import CONTROL
from gentrain.models.families.source import Source
from gentrain.noise import Noise, derive
from gentrain.recipes.export import Export
from gentrain.training.loop import train
from gentrain.training.memory import memory_of
from gentrain.training.roles import load_network
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World
from tests.models.pipelines import PROMPTS, images
from tests.models.test_control_net import MADE

ALONE = World(0, 1, torch.device("cpu"))


def settings(root: Path, side: int) -> dict[str, Any]:
    return {
        "method": {"name": "jdm", "control": {"name": "soft_edges"}},
        "data": images(root / "images", side),
        "model": {"name": "pretrained", "directory": str(root / "pipeline")},
        "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.0},
        "training": {"samples": 12, "batch_size": 4, "log_every": 4, "ema_half_life": 4, "ema_warmup": 0},
        "output": str(root / "run"),
    }


DRAWN_BY = {
    "stable_diffusion": "controlnet.pipeline_controlnet",
    "stable_diffusion_xl": "controlnet.pipeline_controlnet_sd_xl",
    "stable_diffusion_3": "controlnet_sd3.pipeline_stable_diffusion_3_controlnet",
    "flux": "flux.pipeline_flux_controlnet",
    "sana": "sana.pipeline_sana_controlnet",
}
FLOWS = ("stable_diffusion_3", "flux", "sana")


@pytest.mark.parametrize("family", DRAWN_BY)
def test_diffusers_alone_draws_the_same_images_with_the_control(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the card is run as it stands, on the same random numbers. FLUX: with the guidance that its network is told."""
    side = 16 if family not in ("flux", "sana") else 32
    MADE[family](tmp_path / "pipeline")
    given_settings = settings(tmp_path, side)
    path = parse_run(Document(given_settings, "x.yaml")).path
    if family not in FLOWS:
        sigma = (-path.log_snr(torch.tensor(440.0, dtype=torch.float64)) / 2).exp().item()  # the card's timesteps are whole numbers
        given_settings["method"]["sigma"] = sigma
    run = parse_run(Document(given_settings, "x.yaml"))
    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", lambda *_: pytest.fail("a plan reads no weights"))
        assert memory_of(run).peak > 0
    save_config(run)
    train(run, ALONE, lambda: False)
    with pytest.raises(ConfigError, match="form=control_net"):
        Export(run=str(run.directory)).write(tmp_path / "out")
    card = (Export(run=str(run.directory), form="control_net").write(tmp_path / "out") / "README.md").read_text()
    use = re.search(r"```python\n(.*?)```", card, re.S)
    assert use is not None
    denoiser, _ = load_network(run.directory)
    codec, given = run.codec(), Noise(derive(0, "generate"), torch.arange(len(PROMPTS)))
    control = torch.rand(len(PROMPTS), 1, side, side, generator=torch.Generator().manual_seed(0))

    def ours(noise: Noise, told: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            condition = {**codec.condition(torch.arange(len(PROMPTS)), PROMPTS), **told}
            return codec.decode(run.sampler.sample(denoiser, (len(PROMPTS), *codec.shape), noise, condition)) / 2 + 0.5

    expected = ours(Noise(derive(0, "generate"), torch.arange(len(PROMPTS))), {CONTROL: control})
    if family in FLOWS:  # pipelines turn pictures, not tensors, to [-1, 1], and draw the control's latents where we take the mean
        control = 2 * control - 1
        monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(tuple(shape)))
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *shape: given.normal(shape) if len(shape) == 4 else randn(*shape))
    else:
        drawing = import_module(f"diffusers.pipelines.{DRAWN_BY[family]}")
        monkeypatch.setattr(drawing, "randn_tensor", lambda shape, **_: given.normal(tuple(shape)))
    monkeypatch.chdir(tmp_path)
    spoken: dict[str, Any] = {"prompt": PROMPTS, "control": control.expand(-1, 3, -1, -1), "height": side, "width": side}
    exec(use[1], spoken)
    theirs = torch.stack(
        [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8).reshape(side, side, 3) for each in spoken["images"]]
    )
    torch.testing.assert_close(theirs.permute(0, 3, 1, 2) / 255, expected, rtol=0, atol=2.5e-3)  # 1 / 255 and its half
    free = ours(Noise(derive(0, "generate"), torch.arange(len(PROMPTS))), {})
    assert (free - expected).abs().max() > 0.02  # so that the comparison means something
