"""Export of networks that came from a pipeline of diffusers: the complete pipeline again, or the adapter alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn

from gentrain.export import METRICS, appearing, cell, refuse_present
from gentrain.models.adapters import Adapted, OnBase
from gentrain.models.control_net import ControlNet
from gentrain.models.families.base import Family
from gentrain.models.families.source import SNAPSHOT
from gentrain.models.pretrained import PretrainedNetwork
from gentrain.paths.base import Path as Path_
from gentrain.paths.base import convert_time
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.base import Sampler
from gentrain.samplers.few_step import FewStep, call_times
from gentrain.samplers.lcm import LCM, lcm_sampling_timesteps
from gentrain.samplers.one_step import OneStep, time_at

Form = Literal["pipeline", "adapter", "control_net"]

_BACKBONE = "backbone."  # begins the names of PretrainedNetwork's layers

_PIPELINE_USE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")"""

_LORA_USE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({origin})
pipeline.load_lora_weights("{name}")  # needs peft"""

_CONTROL_USE = """from diffusers import {cls}, {net}

controlnet = {net}.from_pretrained("{name}")
pipeline = {cls}.from_pretrained({origin}, controlnet=controlnet)"""

_LCM_USE = """
from diffusers import LCMScheduler

pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps={count})
images = pipeline(prompt, num_inference_steps={steps}, {guidance}"""

_FLOW_LCM_USE = """
from diffusers import FlowMatchLCMScheduler

pipeline.scheduler = FlowMatchLCMScheduler()
pipeline.scheduler.init_noise_sigma = 1.0  # which StableDiffusionPipeline asks for
images = pipeline(prompt, sigmas={sigmas}, {guidance}"""

_ONE_STEP_USE = """
from diffusers import DDPMScheduler

pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
pipeline.scheduler.init_noise_sigma = {start}  # the noise that its one call reads
images = pipeline(prompt, timesteps=[{timestep}], guidance_scale=1).images  # the guidance is built in"""

_FLOW_STEPS_USE = """
{imports}from diffusers import FlowMatchEulerDiscreteScheduler

pipeline.scheduler = FlowMatchEulerDiscreteScheduler({settings})
{noise}
images = pipeline(prompt, {given}sigmas={sigmas}, guidance_scale={guidance:g}).images  # the guidance is built in"""

_NOISE = "pipeline.scheduler.init_noise_sigma = {start}  # the noise that its first call reads"

_OWN_NOISE = """# prompt: a list; height, width: in pixels. The noise that its first call reads:
latents = {start} * torch.randn(len(prompt), {channels}, height // {factor}, width // {factor})"""

_FEW_STEP_USE = """
from diffusers import LCMScheduler

pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=1000, clip_sample=False)
pipeline.scheduler.init_noise_sigma = {start}  # the noise that its first call reads
images = pipeline(prompt, timesteps={timesteps}, guidance_scale=1).images  # the guidance is built in"""

_NO_STEPS_USE = """
# A {pipeline} cannot be called at times of its student's own: draw with `gentrain sample`."""

_PEFT_USE = """from diffusers import DiffusionPipeline
from peft import PeftModel

pipeline = DiffusionPipeline.from_pretrained({origin})
pipeline.{denoiser} = PeftModel.from_pretrained(pipeline.{denoiser}, "{name}")"""

_CARD = (
    """---
{{ card_data }}
---
# {{ name }}

{{ what }} of `{{ origin }}`, a {{ pipeline }}. Made with gentrain {{ gentrain }}.

## Use
Replace `{{ name }}` by the path of this directory. Needs diffusers (written by {{ diffusers }}), not gentrain.
```python
{{ use }}
```

## Data
{{ licence }} What it began with has a licence of its own, which goes on to hold.

## Method
{{ method }}; path {{ path }}, prediction {{ prediction }}.

## Metrics
"""
    + METRICS
    + """
## Configuration
```yaml
{{ config }}```
"""
)


def pretrained_network(network: Any) -> PretrainedNetwork | None:
    """The pipeline's network in one as `load_network` gives it; None when it came from no pipeline."""
    inner = network.base.network if isinstance(network, OnBase) else network
    return inner if isinstance(inner, PretrainedNetwork) else None


def export_pretrained(
    out: Path,
    network: nn.Module,
    form: Form,
    *,
    licence: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
    sampler: Sampler | None = None,
) -> Path:
    """Writes what was trained, for diffusers, and returns the directory's path.

    Args:
        out: must not exist, or be an empty directory; it appears whole or not at all.
        network: a `PretrainedNetwork`, or what was learnt on one.
        form: "pipeline": all components, an adapter merged in. "adapter": the adapter alone, in diffusers' LoRA format where the
            pipeline has `load_lora_weights`, else as a directory of peft. "control_net": the ControlNet of a run that learnt a control.
        licence, config, metrics: as for `export`.
        sampler: the run's; the card says how to draw with one that the pipeline's own scheduler does not replace.

    Raises:
        FileExistsError: `out` is there and not an empty directory. OSError: it cannot be written.
        ValueError: there is no adapter or no ControlNet to write, or the pipeline would lack what was learnt.
    """
    refuse_present(out)
    inner = pretrained_network(network)
    assert inner is not None
    family = inner.family
    if form == "adapter":
        if not isinstance(network, Adapted):
            raise ValueError("the run learnt no adapter; export the pipeline")
        with appearing(out) as partial:
            use = _write_adapter(partial, network, family) + how_to_draw(sampler, inner)
            _write_card(partial, out.name, use, "An adapter", family, licence, config, metrics)
        return out
    branch = inner.control
    if branch is not None and not isinstance(branch, ControlNet):
        raise ValueError(f"diffusers has no ControlNet for a {family.pipelines[0]}; draw samples with gentrain instead")
    if (form == "control_net") != (branch is not None):
        has = "learnt a control, which no pipeline holds; set form=control_net"
        raise ValueError(f"the run {has if branch is not None else 'learnt no control; export the pipeline'}")
    if isinstance(network, OnBase):
        network.fold()
    if branch is not None:
        with appearing(out) as partial:
            branch.net.save_pretrained(partial)  # type: ignore[operator]
            use = _drawn_with_control(sampler, inner)
            _write_card(partial, out.name, use, "A ControlNet", family, licence, config, metrics)
        return out
    pipeline = family.source.pipeline(**{family.denoiser: inner.pipelines_own()})
    with appearing(out) as partial:
        pipeline.save_pretrained(partial)
        use = _PIPELINE_USE + how_to_draw(sampler, inner)
        _write_card(partial, out.name, use, "A further trained copy", family, licence, config, metrics)
    return out


def how_to_draw(sampler: Sampler | None, network: PretrainedNetwork) -> str:
    """Code that draws with a student of few steps or one as `sampler` does, to follow what loads it; empty for other samplers."""
    path = network.family.law()[0]
    if isinstance(sampler, OneStep | FewStep) and not network.family.takes_text:
        return _NO_STEPS_USE.format(pipeline=network.family.pipelines[0])
    if isinstance(sampler, OneStep | FewStep) and not isinstance(path, VariancePreserving):
        return _in_flow_steps(sampler, network.family, path)
    if isinstance(sampler, OneStep):
        return _ONE_STEP_USE.format(start=round(sampler.start(path), 5), timestep=round(time_at(path, sampler.sigma)))
    if isinstance(sampler, FewStep):
        calls = [round(time) for time in call_times(path, sampler.sigma, sampler.steps).tolist()]
        return _FEW_STEP_USE.format(start=round(sampler.start(path), 5), timesteps=calls)
    if not isinstance(sampler, LCM):
        return ""
    built_in = (network.family.guidance_told, "the guidance is built in")
    told = built_in if network.inputs is None else (sampler.guidance, "which the network reads")
    guidance = "guidance_scale={:g}).images  # {}".format(*told)
    if isinstance(path, VariancePreserving):
        return _LCM_USE.format(count=sampler.count, steps=sampler.steps, guidance=guidance)
    timesteps = lcm_sampling_timesteps(sampler.steps, sampler.count, sampler.stride).double()
    times = convert_time(timesteps, sampler.grid, path)
    return _FLOW_LCM_USE.format(sigmas=[round(time, 5) for time in times.tolist()], guidance=guidance)


def _drawn_with_control(sampler: Sampler | None, network: PretrainedNetwork) -> str:
    family = network.family
    given = "image" if family.control_is == "image" else "control_image"
    draw = how_to_draw(sampler, network).replace("pipeline(prompt, ", f"pipeline(prompt, {given}=control, ")
    return _CONTROL_USE.replace("{cls}", family.control_pipeline).replace("{net}", str(family.control_net)) + draw


def _in_flow_steps(sampler: OneStep | FewStep, family: Family, path: Path_) -> str:
    start = round(sampler.start(path), 5)
    calls = [time_at(path, sampler.sigma)] if isinstance(sampler, OneStep) else call_times(path, sampler.sigma, sampler.steps).tolist()
    if family.scales_noise:
        own = {"imports": "", "noise": _NOISE.format(start=start), "given": ""}
    else:
        noise = _OWN_NOISE.format(start=start, channels=family.channels, factor=family.factor) + family.packing
        own = {"imports": "import torch\n", "noise": noise, "given": f"height=height, width=width, {family.call_settings}latents=latents, "}
    settings = "" if isinstance(sampler, OneStep) else "stochastic_sampling=True"
    return _FLOW_STEPS_USE.format(settings=settings, sigmas=[round(time, 5) for time in calls], guidance=family.guidance_told, **own)


def _write_adapter(directory: Path, network: Adapted, family: Family) -> str:
    """Returns the code that uses it."""
    foreign = [name for name in network.targets if not name.startswith(_BACKBONE)]
    if foreign:
        raise ValueError(f"the adapter changes {foreign[0]!r}, which the pipeline has not; export the pipeline")
    state = {name.removeprefix(f"adapter.{_BACKBONE}"): value.contiguous().clone() for name, value in network.state_dict().items()}
    layers, rank = [name.removeprefix(_BACKBONE) for name in network.targets], network.settings.rank
    scale = network.settings.scale
    import diffusers

    cls = getattr(diffusers, family.source.index["_class_name"])
    if hasattr(cls, "load_lora_weights"):
        said = {"r": rank, "lora_alpha": rank, "target_modules": layers}  # in B: many programs that read these files know no other alpha
        state = {name: value * scale if ".lora_B." in name else value for name, value in state.items()}
        weights = {f"{family.denoiser}_lora_layers": state, f"{family.denoiser}_lora_adapter_metadata": said}
        cls.save_lora_weights(directory, safe_serialization=True, **weights)
        return _LORA_USE
    _write_peft(directory, state, {"r": rank, "lora_alpha": rank * scale, "target_modules": layers}, family)
    return _PEFT_USE


def _write_peft(directory: Path, state: dict[str, Tensor], settings: dict[str, Any], family: Family) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    save_file({f"base_model.model.{name}": value for name, value in state.items()}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": family.source.name, "bias": "none", "inference_mode": True, **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_card(
    directory: Path,
    name: str,
    use: str,
    what: str,
    family: Family,
    licence: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    import diffusers
    from huggingface_hub import ModelCard, ModelCardData

    origin, loaded = family.source.name, family.source.call
    use = use.format(name=name, origin=loaded, denoiser=family.denoiser)
    if loaded in use and loaded.startswith(SNAPSHOT):
        use = f"from huggingface_hub import {SNAPSHOT}\n{use}"
    task = "text-to-image" if family.takes_text else "unconditional-image-generation"
    begun_with = None if family.source.is_local else family.source.directory  # by which the hub lists what was made of a repository
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag=task, tags=["gentrain"], base_model=begun_with),
        template_str=_CARD,
        cell=cell,
        name=name,
        what=what,
        origin=cell(origin),
        pipeline=family.source.index["_class_name"],
        gentrain=version("gentrain"),
        diffusers=diffusers.__version__,
        use=use,
        licence=licence,
        method=config.get("method", {}).get("name", "not recorded"),
        path=config.get("path", {}).get("name", "not recorded"),
        prediction=config.get("prediction", "not recorded"),
        metrics=metrics,
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )
    card.save(directory / "README.md")
