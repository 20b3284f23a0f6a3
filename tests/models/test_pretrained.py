"""Networks of pretrained pipelines against diffusers' own pipelines and schedulers, on tiny pipelines with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.models.denoiser import Denoiser
from gentrain.models.pretrained import Pretrained
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.guidance import guided_x0
from gentrain.training.memory import memory_of
from tests.distributed.cases import run_of
from tests.methods.captioned import CaptionedPatches
from tests.models.pipelines import PIPELINES, PROMPTS, SIDE, SIDES, call, images, stable_diffusion

STEPS, GUIDANCE = 4, 3.0


@dataclass
class Opened:
    """A pipeline, and what the project makes of it."""

    directory: Path
    pipeline: Any
    model: Pretrained
    codec: Any
    denoiser: Denoiser


def opened(directory: Path, **settings: Any) -> Opened:
    data = build(Data, Document(images(directory.parent / "images", SIDES.get(directory.name, SIDE)), "test"))  # type: ignore[type-abstract]
    model = Pretrained(str(directory), **settings)
    codec = model.codec(data)
    network = model.build(codec.shape, len(data.class_names)).eval()
    pipeline = DiffusionPipeline.from_pretrained(directory)
    law = model.law()
    assert law is not None
    return Opened(directory, pipeline, model, codec, Denoiser(network, *law))


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(PIPELINES[request.param](tmp_path_factory.mktemp("pipelines") / request.param))


@dataclass
class Step:
    """A step of a scheduler: latents [B, C, H, W] before and after it."""

    t: float
    x: Tensor
    after: Tensor


def steps_of(opened: Opened, guidance: float, **more: Any) -> tuple[list[Step], Tensor]:
    """The steps that the pipeline takes for PROMPTS, and the images [B, 3, H, W] in [0, 1] that it comes to."""
    pipeline, steps, side = opened.pipeline, [], SIDES.get(opened.directory.name, SIDE)
    inner = pipeline.scheduler.step

    def unpacked(x: Tensor) -> Tensor:
        x = pipeline._unpack_latents(x, side, side, pipeline.vae_scale_factor) if x.ndim == 3 else x
        return x[: len(PROMPTS)].float()  # DiT's guided half follows the other

    def step(output: Tensor, t: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = inner(output, t, x, *args, **kwargs)
        steps.append(Step(float(t), unpacked(x), unpacked(result[0])))
        return result

    pipeline.scheduler.step = step
    try:
        made = call(pipeline, side, STEPS, guidance, **more)
    finally:
        pipeline.scheduler.step = inner
    return steps, torch.as_tensor(made).permute(0, 3, 1, 2)


def condition_of(opened: Opened) -> dict[str, Tensor]:
    labels = torch.tensor([0, 1])
    return opened.codec.condition(labels, PROMPTS if opened.model.family.takes_text else None)


def test_predictions_take_the_steps_of_the_pipelines_own_scheduler(family: Opened) -> None:
    """Prompts, guidance with the empty prompt, times, latents: what the pipeline computes from its first latents to its image."""
    family.model.family.guidance_input = GUIDANCE
    steps, made = steps_of(family, GUIDANCE)
    assert len(steps) == STEPS and steps[0].x.shape[1:] == family.codec.shape
    check_steps(family, steps)
    with torch.no_grad():
        decoded = family.codec.decode(steps[-1].after)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), made, rtol=1e-4, atol=1e-4)


def check_steps(opened: Opened, steps: list[Step]) -> None:
    """They are those that the Denoiser's predictions give."""
    guidance = 1.0 if opened.model.family.registered_name == "flux" else GUIDANCE  # of which it is an input
    path, scheduler = opened.denoiser.path, opened.pipeline.scheduler
    for step, following in zip(steps, [*steps[1:], None]):
        t = torch.full((2,), step.t / 1000 if isinstance(path, RectifiedFlow) else step.t)
        with torch.no_grad():
            x0 = guided_x0(opened.denoiser, step.x, t, condition_of(opened), guidance)
        alpha, sigma = path.alpha(t[:1]), path.sigma(t[:1])
        eps = (step.x - alpha * x0) / sigma
        if isinstance(path, RectifiedFlow):
            to = following.t / 1000 if following else 0.0
            after = step.x + (to - t[0]) * (eps - x0)
        else:
            product = scheduler.alphas_cumprod
            to = step.t - 1000 // STEPS
            bar = product[int(to)] if to >= 0 else scheduler.final_alpha_cumprod
            after = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
            torch.testing.assert_close(alpha[0] ** 2, product[int(step.t)].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after, step.after, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("flux", "dit")])  # which have none
def test_a_negative_prompt_is_what_stands_for_no_condition(tmp_path: Path, name: str) -> None:
    made = opened(PIPELINES[name](tmp_path / name), null_prompt="zoo")
    steps, _ = steps_of(made, GUIDANCE, negative_prompt=["zoo", "zoo"])
    check_steps(made, steps)
    without, _ = steps_of(made, GUIDANCE)
    assert (without[0].after - steps[0].after).abs().max() > 1e-3  # ten times what would pass


def test_sdxl_is_told_the_height_of_an_image_before_its_width(tmp_path: Path) -> None:
    """As its pipeline tells it, of images that are no squares."""
    made = opened(PIPELINES["stable_diffusion_xl"](tmp_path / "stable_diffusion_xl"))
    told: list[dict[str, Tensor]] = []
    unet = made.denoiser.network.backbone  # type: ignore[attr-defined]
    for each in (unet, made.pipeline.unet):
        each.register_forward_pre_hook(lambda module, arguments, given: told.append(given["added_cond_kwargs"]), with_kwargs=True)
    with torch.no_grad():
        made.denoiser.raw(torch.randn(2, 4, 8, 12), torch.full((2,), 500.0), condition_of(made))
    made.pipeline(PROMPTS, height=16, width=24, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert torch.equal(told[0]["time_ids"], told[1]["time_ids"]) and told[0]["time_ids"][0].tolist() == [16, 24, 0, 0, 16, 24]


def test_eps_x0_and_velocity_are_those_of_the_networks_output(family: Opened) -> None:
    denoiser, path = family.denoiser, family.denoiser.path
    x, t = torch.randn(2, *family.codec.shape, generator=torch.manual_seed(1)), torch.full((2,), 0.3 * path.t_max)
    with torch.no_grad():
        raw = denoiser.raw(x, t, condition_of(family))
        x0, eps = denoiser.x0(x, t, condition_of(family)), denoiser.eps(x, t, condition_of(family))
        velocity = denoiser.velocity(x, t, condition_of(family))
    assert raw.shape == x.shape and raw.std() > 1e-3
    alpha, sigma = path.alpha(t[:1]), path.sigma(t[:1])
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity, path.velocity(x0, eps, t), rtol=1e-4, atol=1e-4)
    expected = {"eps": eps, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[denoiser.prediction]
    torch.testing.assert_close(raw, expected, rtol=1e-3, atol=1e-4)


def test_images_become_latents_as_the_autoencoder_says_and_back(family: Opened) -> None:
    side = SIDES.get(family.directory.name, SIDE)
    x = torch.rand(2, 3, side, side, generator=torch.manual_seed(2)) * 2 - 1
    batch = {"x": x, "label": torch.tensor([0, 1]), "index": torch.arange(2)}
    encoded = family.codec.encode(batch, Noise(0, batch["index"]))
    assert encoded["x"].shape == (2, *family.codec.shape) and not encoded["x"].requires_grad
    vae = family.pipeline.vae
    with torch.no_grad():
        said = vae.encode(x)
        if hasattr(said, "latent_dist"):
            latents = said.latent_dist.mean + said.latent_dist.std * Noise(0, batch["index"]).normal(tuple(said.latent_dist.mean.shape))
        else:
            latents = said.latent
        config = vae.config
        latents = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
        back = vae.decode(latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)).sample
    torch.testing.assert_close(encoded["x"], latents)
    torch.testing.assert_close(family.codec.decode(latents), back.clamp(-1, 1))
    assert torch.equal(encoded["x"], family.codec.encode(batch, Noise(0, batch["index"]))["x"])  # of the samples, not of the process


def test_no_condition_the_null_label_and_dropped_rows_are_the_empty_prompt(family: Opened) -> None:
    from gentrain.models.denoiser import drop_condition

    x, t = torch.randn(2, *family.codec.shape, generator=torch.manual_seed(1)), torch.full((2,), 0.5 * family.denoiser.path.t_max)
    condition = condition_of(family)
    with torch.no_grad():
        given, none = family.denoiser.raw(x, t, condition), family.denoiser.raw(x, t, None)
        half = family.denoiser.raw(x, t, drop_condition(condition, torch.tensor([True, False])))
        null = family.denoiser.raw(x, t, family.codec.condition(torch.tensor([-1, -1])))
    assert (given - none).abs().amax((1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(half[0], none[0])
    torch.testing.assert_close(half[1], given[1])
    torch.testing.assert_close(null, none)


def test_in_training_nothing_is_drawn_beside_what_methods_ask_for(family: Opened) -> None:
    network: Any = family.denoiser.network
    x, t = torch.randn(16, *family.codec.shape, generator=torch.manual_seed(1)), torch.full((16,), 0.5 * family.denoiser.path.t_max)
    condition = {name: value[:1].expand(16, *value.shape[1:]) for name, value in condition_of(family).items()}
    with torch.no_grad():
        evaluated, trained = (
            family.denoiser.raw(x, t, condition),
            Denoiser(network.train(), family.denoiser.path, "eps").raw(x, t, condition),
        )
    network.eval()
    torch.testing.assert_close(trained, evaluated)


def test_the_meta_device_counts_parameters_without_weights(family: Opened) -> None:
    with torch.device("meta"):
        network = family.model.build(family.codec.shape, 2)
    mine = {name: p.shape for name, p in family.denoiser.network.named_parameters()}  # type: ignore[attr-defined]
    assert {name: p.shape for name, p in network.named_parameters()} == mine and all(p.is_meta for p in network.parameters())


# --- paths ---


@pytest.mark.parametrize(
    "scheduler, prediction",
    [({}, "eps"), ({"prediction_type": "v_prediction"}, "v"), ({"prediction_type": "sample"}, "x0"),
     ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, "eps"), ({"beta_schedule": "squaredcos_cap_v2"}, "eps"),
     ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v")],
)  # fmt: skip
def test_the_path_is_the_schedulers(tmp_path: Path, scheduler: dict[str, Any], prediction: str) -> None:
    directory = stable_diffusion(tmp_path / "sd", **scheduler)
    path, said = Pretrained(str(directory)).law()  # type: ignore[misc]
    assert isinstance(path, VariancePreserving) and said == prediction
    product = DiffusionPipeline.from_pretrained(directory).scheduler.alphas_cumprod.double()
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2, product, rtol=2e-4, atol=1e-7)  # theirs is float32


def _run(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "method": "diffusion", "data": images(directory.parent / "images"), "model": {"name": "pretrained", "directory": str(directory)},
        "engine": "torch", "training": {"samples": 8, "batch_size": 4}, **more,
    }  # fmt: skip


def test_a_run_follows_the_pipeline_and_refuses_what_contradicts_it(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "sd", prediction_type="v_prediction")
    run = run_of(_run(directory))
    assert isinstance(run.path, VariancePreserving) and run.path.schedule == "scaled_linear" and run.prediction == "v"
    same = {"name": "variance_preserving", "schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    assert run_of(_run(directory, path=same, prediction="v")).prediction == "v"
    with pytest.raises(ConfigError, match=r"path: .*another path, .*scaled_linear.*leave `path` out"):
        run_of(_run(directory, path="variance_preserving"))
    with pytest.raises(ConfigError, match=r"prediction: .*predicts v, not eps; leave `prediction` out"):
        run_of(_run(directory, prediction="eps"))
    other = {"roles": {"model": {"model": {"name": "pretrained", "directory": str(stable_diffusion(tmp_path / "eps"))}}}}
    with pytest.raises(ConfigError, match=r"roles\.model\.model: .*predicts eps, not v"):
        run_of(_run(directory, **other))


# --- mistakes ---


def _index(directory: Path, **changes: Any) -> None:
    file = directory / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _config(directory: Path, component: str, name: str = "config", **changes: Any) -> None:
    file = directory / component / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _without(directory: Path, name: str) -> None:
    shutil.rmtree(directory / name)


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no pipeline": (lambda d: (d / "model_index.json").unlink(), "model_index.json cannot be read .*save_pretrained"),
    "unknown family": (lambda d: _index(d, _class_name="AudioLDMPipeline"), "AudioLDMPipeline, a pipeline of no family .*SanaPipeline"),
    "own code": (lambda d: _index(d, _class_name=["pipeline", "Mine"]), "names no pipeline of diffusers itself"),
    "missing component": (lambda d: _index(d, text_encoder=[None, None]), "has no text_encoder, only .*unet"),
    "other autoencoder": (lambda d: _config(d, "vae", latent_channels=16), "makes latents of 16 channels, its unet takes 4; .*pipelines"),
    "missing files": (lambda d: _without(d, "vae"), "vae/config.json cannot be read"),
    "other network": (lambda d: _index(d, unet=["diffusers", "DiTTransformer2DModel"]), "unet is a DiTTransformer2DModel, not a UNet2D"),
    "other texts": (lambda d: _config(d, "text_encoder", hidden_size=24), "make texts 24 wide, its unet takes 16; .*two pipelines"),
    "foreign class": (lambda d: _index(d, unet=["mine", "UNet"]), "unet .* is mine.UNet, no class of this version"),
    "no scale": (lambda d: _config(d, "vae", scaling_factor=0), r"scaling_factor in .*/vae/config.json is 0, no positive number"),
    "no list": (lambda d: _config(d, "vae", block_out_channels=None), r"pipeline in .* has a damaged configuration \(TypeError: "),
    "no number": (lambda d: _config(d, "scheduler", "scheduler_config", beta_end="x"), "damaged configuration"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_pipeline_is_told_as_the_configuration_loads(tmp_path: Path, mistake: str) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    damage, said = MISTAKES[mistake]
    damage(directory)
    with pytest.raises(ConfigError, match=rf"model: .*{said}"):
        run_of(_run(directory))


@pytest.mark.parametrize(
    "name, component, width",
    [("stable_diffusion_xl", "text_encoder_2", "hidden_size"), ("stable_diffusion_3", "text_encoder_3", "d_model"),
     ("flux", "text_encoder_2", "d_model"), ("pixart_sigma", "text_encoder", "d_model"), ("sana", "text_encoder", "hidden_size")],
)  # fmt: skip
def test_text_encoders_of_another_pipeline_are_told(tmp_path: Path, name: str, component: str, width: str) -> None:
    directory = PIPELINES[name](tmp_path / name)
    _config(directory, component, **{width: 24})
    with pytest.raises(ValueError, match=r"the text encoders in .* make texts \d+ wide, its .* takes \d+; they are parts of two pipelines"):
        Pretrained(str(directory))


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    run = run_of(_run(directory))
    (directory / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    from gentrain.training.roles import build_network

    with pytest.raises(ConfigError, match=r"model: unet of the pipeline in .* cannot be loaded"):
        build_network(run, "model")


def _fewer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(weights.items())[2:])


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"other.{name}": value for name, value in weights.items()}


def _not_finite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {
        name: value.masked_fill(torch.ones_like(value, dtype=torch.bool), torch.nan) for name, value in [min(weights.items())]
    }


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "damage, said",
    [(_fewer, "lack 2 of [0-9]+ weights, such as "), (_renamed, "lack ([0-9]+) of \\1 weights"), (_not_finite, "weights .* are not finite"),
     (None, "cannot be loaded")],
)  # fmt: skip
def test_weights_are_whole_and_numbers(tmp_path: Path, component: str, damage: Any, said: str) -> None:
    """What lacks would be drawn at random by the libraries, which only log it."""
    directory = stable_diffusion(tmp_path / "sd")
    file = next((directory / component).glob("*.safetensors"))
    if damage is None:
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(damage(load_file(file)), file, {"format": "pt"})
    source = Pretrained(str(directory)).family.source
    for load in (source.load, lambda component: source.pipeline()):
        with pytest.raises(ValueError, match=rf"{component} of the pipeline in .*/sd .*{said}"):
            load(component)


def test_what_older_versions_did_not_write_is_the_default_of_the_class(tmp_path: Path) -> None:
    """As of the autoencoder of Stable Diffusion 1: its configuration has no scale, and its attention other names."""
    directory = stable_diffusion(tmp_path / "sd")
    whole = Pretrained(str(directory)).codec(CaptionedPatches()).posterior(x := torch.rand(1, 3, SIDE, SIDE))  # type: ignore[attr-defined]
    file = directory / "vae" / "config.json"
    kept = (
        "_class_name",
        "block_out_channels",
        "down_block_types",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "up_block_types",
    )
    file.write_text(json.dumps({key: json.loads(file.read_text())[key] for key in kept}))
    weights = load_file(directory / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {re.sub(rf"(attentions.*)\.{new}\.", rf"\1.{old}.", name): value for name, value in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, directory / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    older = Pretrained(str(directory)).codec(CaptionedPatches()).posterior(x)  # type: ignore[attr-defined]
    assert all(torch.equal(*pair) for pair in zip(whole, older, strict=True))


def test_a_template_with_another_place_than_the_captions_is_refused(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    with pytest.raises(ConfigError, match=r"model\.prompt: \{name\} would stand in each prompt as it is; write \{\}"):
        run_of(_run(directory, model={"name": "pretrained", "directory": str(directory), "prompt": "a photo of a {name}"}))


def test_images_that_do_not_fit_and_an_autoencoder_that_gives_no_numbers_are_named(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    settings = _run(directory)
    with pytest.raises(ConfigError, match=r"model: .* for colour images \(3, H, W\)"):
        run_of(settings | {"data": settings["data"] | {"colours": "grey"}}).codec()
    with pytest.raises(ConfigError, match=r"model: images of 15x15 pixels are not divisible by 2"):
        run_of(settings | {"data": settings["data"] | {"size": 15}}).codec()
    codec = run_of(settings).codec()
    for p in codec._vae.parameters():  # type: ignore[attr-defined]
        p.fill_(float("nan"))
    batch = {"x": torch.zeros(1, 3, SIDE, SIDE), "index": torch.arange(1)}
    with pytest.raises(ValueError, match=r"autoencoder of .* not finite"):
        codec.encode(batch, Noise(0, batch["index"]))


def _without_a_folder(directory: Path) -> None:
    shutil.rmtree(directory / "tokenizer")


def _pickled(directory: Path) -> None:
    (directory / "text_encoder" / "model.safetensors").rename(directory / "text_encoder" / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, said",
    [(_without_a_folder, "has no folder tokenizer, which its model_index.json names"), (_pickled, "only safetensors are read")],
)
def test_what_prompts_need_and_is_not_there_is_named(tmp_path: Path, damage: Any, said: str) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    damage(directory)
    codec = run_of(_run(directory)).codec()
    with pytest.raises(ValueError, match=said):
        codec.condition(torch.tensor([0]))


def test_places_that_are_no_pipeline_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for place, said in (
        (str(tmp_path / "model.safetensors"), ".*/model.safetensors is a file; convert it with from_single_file and save_pretrained"),
        ("./nowhere", r"there is no directory \./nowhere; name a directory that save_pretrained"),
        ("~/nowhere", f"there is no directory {tmp_path}/nowhere"),
    ):
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(ConfigError, match=rf"model: {said}"):
            run_of(_run(directory, model={"name": "pretrained", "directory": place}))
    assert Pretrained("~/sd").directory == str(directory)
    with pytest.raises(ConfigError, match=r"model: .* is a directory, which has no revisions"):
        run_of(_run(directory, model={"name": "pretrained", "directory": str(directory), "revision": "main"}))


def test_pipelines_whose_networks_read_other_things_are_no_roles_of_one_run(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "sd")
    method, data = {"name": "distribution_matching", "generator_loss": "dmd"}, images(tmp_path / "images")

    def beside(other: Path) -> Any:
        return run_of(
            _run(directory, method=method, data=data, roles={"teacher": {"model": {"name": "pretrained", "directory": str(other)}}})
        )

    with pytest.raises(ConfigError, match=r"roles\.teacher\.model: .* differ in family \(stable_diffusion_xl and stable_diffusion\)"):
        beside(PIPELINES["stable_diffusion_xl"](tmp_path / "xl"))
    scaled = stable_diffusion(tmp_path / "scaled")
    assert beside(scaled).model_of("teacher").directory == str(scaled)
    _config(scaled, "unet", cross_attention_dim=32)
    _config(scaled, "text_encoder", hidden_size=32)
    with pytest.raises(ConfigError, match=r"differ in the shape of texts \(prompt\) \(\[8, 32\] and \[8, 16\]\)"):
        beside(scaled)
    _config(scaled, "vae", scaling_factor=0.5)
    with pytest.raises(ConfigError, match=r"roles\.teacher\.model: .* differ in scaling_factor \(0\.5 and 0\.18215\)"):
        beside(scaled)


# --- prompts ---


class _Captioned(Data):
    """Two images with texts, and a class that no prompt comes from."""

    shape = (3, SIDE, SIDE)  # type: ignore[assignment]
    class_names = ("thing",)  # type: ignore[assignment]
    captions = ("cat", "a dog", "zoo")  # type: ignore[assignment]


def test_captions_become_prompts_by_the_template_and_are_encoded_once(tmp_path: Path) -> None:
    model = Pretrained(str(stable_diffusion(tmp_path / "sd")), prompt="my {}")
    codec = model.codec(_Captioned())
    asked: list[list[str]] = []
    inner = model.family.texts

    def texts(pipeline: Any, prompts: Any, device: torch.device) -> Any:
        asked.append(list(prompts))
        return inner(pipeline, prompts, device)

    model.family.texts = texts  # type: ignore[method-assign]
    batch = {"x": torch.zeros(3, 3, SIDE, SIDE), "label": torch.zeros(3, dtype=torch.int64), "index": torch.arange(3)}
    encoded = codec.encode(batch | {"caption": torch.tensor([1, 0, 1])}, Noise(0, batch["index"]))
    assert asked == [["my a dog", "my cat"]] and codec.names == _Captioned.captions
    assert torch.equal(encoded["condition/prompt"][0], encoded["condition/prompt"][2]) and not encoded["condition/null"].any()
    condition = codec.condition(torch.tensor([0, -1]))
    assert asked[1:] == [[""]] and condition is not None and condition["null"].tolist() == [False, True]
    assert torch.equal(condition["prompt"][0], encoded["condition/prompt"][1])
    chosen = codec.condition(torch.tensor([0]), ["my cat"])  # prompts are taken as they are
    assert chosen is not None and torch.equal(chosen["prompt"], condition["prompt"][:1]) and len(asked) == 2


def test_a_pipeline_of_classes_refuses_data_with_nothing_but_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n")
    data = {"name": "prompts", "path": str(tmp_path / "prompts.txt"), "size": SIDE}
    with pytest.raises(ConfigError, match=r"model: the pipeline in .* takes classes, and the data have prompts"):
        run_of(_run(PIPELINES["dit"](tmp_path / "dit"), data=data, method="distribution_matching")).codec()


def test_classes_are_no_prompts(family: Opened) -> None:
    if family.model.family.takes_text:
        assert set(condition_of(family)) > {"null"}
    else:
        with pytest.raises(ValueError, match="takes classes, not prompts"):
            family.codec.condition(torch.tensor([0]), ["cat"])


# --- without weights ----------------------------------------------------------------------------------------------------------


def test_configurations_tell_the_shapes_of_texts_and_what_the_codec_holds(family: Opened) -> None:
    known = family.model.family
    skeletons = family.codec.skeletons()
    for name, skeleton in skeletons.items():
        assert {key: v.shape for key, v in skeleton.state_dict().items()} == {
            key: v.shape for key, v in known.source.load(name).state_dict().items()
        }
    if not known.takes_text:
        assert list(skeletons) == ["vae"]
        return
    found, told = known.texts(known.text_pipeline(), PROMPTS, torch.device("cpu")), known.text_shapes()
    assert {key: (value.shape[1:], value.dtype) for key, value in found.items()} == {
        key: (value.shape[1:], value.dtype) for key, value in told.items()
    }


def test_a_plan_needs_configurations_alone(tmp_path: Path) -> None:
    directory = stable_diffusion(tmp_path / "pipeline")
    run = run_of({
        "model": {"name": "pretrained", "directory": str(directory)}, "method": "distribution_matching", "engine": "torch",
        "data": images(tmp_path / "images"), "training": {"samples": 8, "batch_size": 2}, "adapter": {"rank": 2},
        "output": str(tmp_path / "run"),
    })  # fmt: skip
    memory = memory_of(run)
    for file in directory.rglob("*.safetensors"):
        file.unlink()
    del run.model.family  # type: ignore[attr-defined]
    assert memory_of(run) == memory
    assert [part.name for part in memory.parts] == ["below teacher, fake_score, student", "fake_score", "student", "vae", "text_encoder"]
    assert all(part.activations is None or not part.activations.assumed for part in memory.parts)
