"""Export: the directory draws the sampler's images in a process that has no gentrain."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentrain.export import export
from gentrain.models.denoiser import Denoiser
from gentrain.models.dit import DiT
from gentrain.models.mlp import MLP
from gentrain.models.unet import UNet
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.dpm_solver import DPMSolver
from gentrain.samplers.euler import Euler
from gentrain.samplers.few_step import FewStep
from gentrain.samplers.heun import Heun
from gentrain.samplers.one_step import OneStep

CLASSES = ("cat", "dog", "owl")
ROWS = 6
UNET = UNet(channels=(8, 16), norm_groups=4, attention_head_dim=8)
DEEP = UNet(channels=(8, 16), norm_groups=4, attention_head_dim=8, space_to_depth=2)
TRANSFORMER = DiT(layers=2, heads=2, head_dim=8)
SLOW = UNet(channels=(8, 16), norm_groups=4, attention_head_dim=8, time_scale=0.01)

CASES = {
    "rectified flow, labels, space to depth": (DEEP, (1, 8, 12), 3, RectifiedFlow(), "velocity", Euler(steps=5, guidance=2.0)),
    "transformer": (TRANSFORMER, (3, 6, 6), 3, RectifiedFlow(), "velocity", Euler(steps=5, guidance=2.0)),
    "transformer without classes": (TRANSFORMER, (3, 6, 6), 0, RectifiedFlow(), "velocity", Euler(steps=5)),
    "stock pipeline": (UNET, (3, 4, 8), 0, VariancePreserving(), "eps", DDIM(steps=10)),
    "slow time": (SLOW, (3, 4, 8), 0, VariancePreserving(), "eps", DDIM(steps=10)),
    "slow time, EDM": (SLOW, (1, 8, 8), 3, VarianceExploding(), "edm", OneStep()),
    "variance preserving, labels": (UNET, (1, 8, 8), 3, VariancePreserving("cosine"), "v", DDIM(steps=5, guidance=1.5)),
    "Euler in the variance-exploding frame": (UNET, (1, 8, 8), 3, VariancePreserving(), "eps", Euler(steps=5, guidance=2.0)),
    "Heun": (UNET, (1, 8, 8), 3, VariancePreserving(), "v", Heun(steps=4, guidance=2.0)),
    "DPM-Solver++": (UNET, (1, 8, 8), 3, VariancePreserving(), "x0", DPMSolver(steps=5, guidance=2.0)),
    "EDM": (UNET, (1, 8, 8), 3, VarianceExploding(), "edm", Euler(steps=6, guidance=2.0)),
    "EDM, DPM-Solver++": (DEEP, (1, 8, 8), 3, VarianceExploding(), "edm", DPMSolver(steps=6, guidance=1.0)),
    "one step, rectified flow": (DEEP, (1, 8, 8), 3, RectifiedFlow(), "velocity", OneStep()),
    "one step, variance preserving": (UNET, (1, 8, 8), 3, VariancePreserving("cosine"), "eps", OneStep(sigma=1.7)),
    "one step, trigflow, transformer": (TRANSFORMER, (3, 6, 6), 0, TrigFlow(), "v", OneStep()),
    "one step, EDM": (UNET, (1, 8, 8), 3, VarianceExploding(), "edm", OneStep()),
    "three steps, rectified flow": (DEEP, (1, 8, 8), 3, RectifiedFlow(), "velocity", FewStep(steps=3)),
    "two steps, variance preserving": (UNET, (1, 8, 8), 0, VariancePreserving(), "eps", FewStep(steps=2, sigma=1.7)),
    "two steps, EDM": (SLOW, (1, 8, 8), 3, VarianceExploding(), "edm", FewStep(steps=2)),
    "consistency, rectified flow": (DEEP, (1, 8, 8), 3, RectifiedFlow(), "velocity", Consistency(steps=3)),
    "consistency, variance preserving": (UNET, (1, 8, 8), 0, VariancePreserving(), "v", Consistency(steps=2)),
    "consistency, EDM": (UNET, (1, 8, 8), 3, VarianceExploding(), "edm", Consistency(steps=2)),
    "flow map": (DEEP, (1, 8, 8), 3, RectifiedFlow(), "velocity", Euler(steps=4, guidance=2.0)),
    "flow map without classes": (UNET, (3, 4, 8), 0, RectifiedFlow(), "velocity", Euler(steps=4)),
    "flow map, transformer": (TRANSFORMER, (3, 6, 6), 3, RectifiedFlow(), "velocity", Euler(steps=4, guidance=2.0)),
}

# draws with every exported directory; importing gentrain would fail
DRAW = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

sys.modules["gentrain"] = None
for directory in sys.argv[1:]:
    trusted = "pipeline.py" in json.dumps(json.load(open(directory + "/trust.json")))
    pipeline = DiffusionPipeline.from_pretrained(directory + "/model", trust_remote_code=trusted)
    pipeline.set_progress_bar_config(disable=True)
    given = load_file(directory + "/noise.safetensors")
    labels = given["label"].tolist() if "label" in given else None
    if trusted:
        generator = torch.Generator().manual_seed(1)
        images = pipeline(class_labels=labels, noise=given["noise"], generator=generator, output_type="pt").images
    else:
        # a stock pipeline takes no noise: have its generator hand it ours
        import diffusers.pipelines.ddim.pipeline_ddim as module
        module.randn_tensor = lambda shape, **_: given["noise"]
        images = pipeline(num_inference_steps=10, output_type="pt").images
    save_file({"images": images.contiguous()}, directory + "/images.safetensors")
"""


class ThenDrawn(Noise):
    """After the first call, what the generator of DRAW gives."""

    def normal(self, shape, dtype=torch.float32):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(1)
            return super().normal(shape, dtype)
        return torch.randn(shape, generator=self.generator)


def denoiser_of(model, shape, num_classes, path, prediction, inputs=()):
    torch.manual_seed(0)
    network = model.build(shape, num_classes).eval()
    if inputs:
        network.add_inputs(inputs)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Denoiser(network, path, prediction)


def write(out, denoiser, sampler, classes=CLASSES, **kwargs):
    return export(out, denoiser, sampler, class_names=classes, licence="Made up for a test.", config={"seed": 1}, **kwargs)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What each case's directory draws, and what its sampler draws."""
    root = tmp_path_factory.mktemp("export")
    expected = {}
    for number, (name, (model, shape, num_classes, path, prediction, sampler)) in enumerate(CASES.items()):
        inputs = ("end", "augment") if name.startswith("flow map") else ()  # an absent end is t, which is not nothing
        denoiser = denoiser_of(model, shape, num_classes, path, prediction, inputs)
        directory = root / str(number)
        write(directory / "model", denoiser, sampler, CLASSES[:num_classes])
        label = torch.arange(ROWS) % 3
        given = {"noise": Noise(7, torch.arange(ROWS)).normal((ROWS, *shape))}
        save_file(given | ({"label": label} if num_classes else {}), directory / "noise.safetensors")
        (directory / "trust.json").write_text(json.dumps(sorted(p.name for p in (directory / "model").iterdir())))
        with torch.no_grad():
            samples = sampler.sample(denoiser, (ROWS, *shape), ThenDrawn(7, torch.arange(ROWS)), {"label": label} if num_classes else None)
        expected[name] = (directory, (samples / 2 + 0.5).clamp(0, 1))
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    directories = [str(directory) for directory, _ in expected.values()]
    subprocess.run([sys.executable, "-I", "-c", DRAW, *directories], check=True, env=environment, cwd=root)
    return {name: (load_file(directory / "images.safetensors")["images"], images) for name, (directory, images) in expected.items()}


@pytest.mark.parametrize("name", CASES)
def test_draws_the_same_images_for_the_same_noise_without_gentrain(drawn, name):
    images, expected = drawn[name]
    assert expected.std() > 0.05  # not all clipped to one value
    # at most 8e-6 over six seeds; 7e-5 where x is 157 at the start, for float32 rounds there
    atol = 2e-4 if name == "Euler in the variance-exploding frame" else 2e-5
    torch.testing.assert_close(images, expected, rtol=0, atol=atol)


def test_holds_safetensors_a_scheduler_and_a_card(tmp_path):
    metric = {"name": "class accuracy", "value": 0.98, "low": 0.97, "high": 0.99, "better": "higher", "definition": "read as asked"}
    model, shape, num_classes, path, prediction, sampler = CASES["rectified flow, labels, space to depth"]
    denoiser = denoiser_of(model, shape, num_classes, path, prediction)
    out = write(tmp_path / "deep" / "owls", denoiser, sampler, metrics=[metric])
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "model_index.json",
        "network/config.json",
        "network/diffusion_pytorch_model.safetensors",
        "pipeline.py",
        "scheduler/scheduler_config.json",
    ]
    weights = load_file(out / "network/diffusion_pytorch_model.safetensors")
    for name, value in denoiser.network.backbone.state_dict().items():
        assert torch.equal(weights[name], value)
    assert "gentrain" not in {line.split()[1].split(".")[0] for line in (out / "pipeline.py").read_text().splitlines() if "import " in line}
    card = (out / "README.md").read_text()
    for part in (
        "8x12",
        "cat, dog, owl",
        "trust_remote_code=True",
        "Made up for a test.",
        "| class accuracy | 0.98 | 0.97 to 0.99 |",
        "seed: 1",
    ):
        assert part in card
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["owls"]


def test_the_line_of_the_card_draws_by_name_and_refuses_unknown_classes(tmp_path):
    from diffusers import DiffusionPipeline

    model, shape, num_classes, path, prediction, sampler = CASES["rectified flow, labels, space to depth"]
    out = write(tmp_path / "owls", denoiser_of(model, shape, num_classes, path, prediction), sampler)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(out)
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    by_name = pipeline(["owl", "cat"], generator=torch.Generator().manual_seed(0), output_type="np").images
    by_number = pipeline([2, 0], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert by_name.shape == (2, 8, 12, 1) and (by_name == by_number).all()
    assert pipeline("owl", num_inference_steps=2).images[0].size == (12, 8) and len(pipeline(2).images) == 1
    with pytest.raises(ValueError, match="at least 1"):
        pipeline("owl", num_inference_steps=0)
    for label in ("ant", 3, -1):
        with pytest.raises(ValueError, match="the classes are cat, dog, owl"):
            pipeline([label])


@pytest.mark.parametrize(
    ("model", "shape", "path", "prediction", "sampler", "message"),
    [
        (MLP(), (2,), RectifiedFlow(), "velocity", Euler(), "only the networks unet and dit"),
        (UNET, (1, 8, 8), TrigFlow(), "velocity", Euler(steps=7), r"sampler euler \(7 steps\) on path trigflow with prediction velocity"),
        (UNET, (1, 8, 8), VariancePreserving(), "eps", DDIM(steps=10, eta=0.5), "eta: 0"),
    ],
)
def test_what_diffusers_cannot_draw_is_refused(tmp_path, model, shape, path, prediction, sampler, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", denoiser_of(model, shape, 3, path, prediction), sampler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("case", "steps"), [("one step, rectified flow", "1 step"), ("three steps, rectified flow", "3 steps")])
def test_a_students_directory_has_no_scheduler_and_refuses_other_steps(tmp_path, case, steps):
    from diffusers import DiffusionPipeline

    model, shape, num_classes, path, prediction, sampler = CASES[case]
    out = write(tmp_path / "owls", denoiser_of(model, shape, num_classes, path, prediction), sampler)
    assert not (out / "scheduler").exists()
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(["owl", 1]).images) == 2
    for arguments in ({"num_inference_steps": 2}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=f"draws in {steps} without guidance"):
            pipeline("owl", **arguments)


def test_never_writes_over_what_is_there_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, shape, num_classes, path, prediction, sampler = CASES["rectified flow, labels, space to depth"]
    denoiser = denoiser_of(model, shape, num_classes, path, prediction)
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("keep")
    file.write_text("keep")
    for out in (full, file):
        with pytest.raises(FileExistsError, match="not an empty directory"):
            write(out, denoiser, sampler)
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("gentrain.export._write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(empty, denoiser, sampler)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"] and not any(empty.iterdir())
    assert (write(empty, denoiser, sampler) / "model_index.json").is_file()
