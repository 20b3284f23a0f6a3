"""Export: a directory from which diffusers draws the same images for the same noise, without gentrain."""

from __future__ import annotations

import glob
import html
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from gentrain.models.conditional import ConditionalNetwork
from gentrain.models.denoiser import Denoiser
from gentrain.paths.space import Free
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.few_step import FewStep, call_times
from gentrain.samplers.one_step import OneStep, as_affine

_STOCK_USE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
image = pipeline(num_inference_steps={steps}).images[0]"""

_CUSTOM_USE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipeline({call}).images[0]"""

_CUSTOM_NOTE = """
`trust_remote_code=True` runs this directory's `pipeline.py`, for no pipeline of diffusers itself draws as this one does: read it first.
"""

METRICS = """{% if metrics %}| metric | value | 95 % interval | better | definition |
|---|---|---|---|---|
{% for m in metrics %}| {{ cell(m.name) }} | {{ "%.4g" | format(m.value) }} | \
{{ "%.4g" | format(m.low) }} to {{ "%.4g" | format(m.high) }} | {{ cell(m.better) }} | {{ cell(m.definition) }} |
{% endfor %}{% else %}None were measured.
{% endif %}"""

_CARD = (
    """---
{{ card_data }}
---
# {{ name }}

Draws {{ size }} images{% if classes %} of {{ classes | length }} classes ({{ classes | join(", ") }}){% endif %}. \
{{ parameters }} parameters. Made with gentrain {{ gentrain }}.

## Use
Replace `{{ name }}` by the path of this directory. Needs torch and diffusers (written by {{ diffusers }}), not gentrain.
```python
{{ use }}
```
{{ note }}
## Data
{{ licence }}

## Method
{{ method }}; path {{ path }}, prediction {{ prediction }}; drawn with {{ sampler }}, {{ steps }} steps, guidance {{ guidance }}.

## Metrics
"""
    + METRICS
    + """
## Limits
It draws images like those of its data and nothing else, {{ size }} pixels only. A metric holds for what its definition says.
Nothing was done to keep it from repeating images of its data.

## Configuration
```yaml
{{ config }}```
"""
)


def export(
    out: Path,
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    class_names: Sequence[str],
    licence: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes a diffusers directory (weights as safetensors, scheduler, model card) and returns its path.

    A pipeline of diffusers itself where one takes the sampler's steps (DDIMPipeline), else `pipeline.py` in the directory.

    Args:
        out: must not exist, or be an empty directory; it appears whole or not at all.
        denoiser: of a `ConditionalNetwork` with its full weights.
        sampler: whose steps the directory's scheduler takes; OneStep, FewStep and Consistency need none.
        class_names: one per class; empty without classes.
        licence: of the data, for the card.
        config: the resolved configuration; `config["method"]["name"]` is named in the card.
        metrics: {"name", "value", "low", "high", "better", "definition"} each.

    Raises:
        FileExistsError: `out` is there and not an empty directory.
        OSError: it cannot be written.
        ValueError: the network is none of diffusers', or no diffusers scheduler takes the sampler's steps.
    """
    refuse_present(out)
    pipeline = _pipeline(denoiser, sampler, class_names)
    with appearing(out) as partial:
        pipeline.save_pretrained(partial)
        custom = type(pipeline).__module__ == "gentrain.export_pipeline"
        if custom:
            _add_code(partial, type(pipeline))
        _write_card(partial, out.name, custom, denoiser, sampler, class_names, licence, config, metrics)
    return out


def refuse_present(out: Path) -> None:
    """Raises FileExistsError unless `out` is not there, or an empty directory, and has a name."""
    if out.name in ("", ".."):
        raise FileExistsError(f"{out} is no name of a directory to be made; give it one")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is not an empty directory; name another")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory to write in that becomes `out` at the end, or leaves nothing. Raises OSError, which names `out`."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial(out)
        yield partial
        os.rename(partial, out)
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror or error}); name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_partial(out: Path) -> None:
    """Removes what exports to `out` that were killed have left."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        if not psutil.pid_exists(int(path.name.split(".")[-2])):
            shutil.rmtree(path)


def _pipeline(denoiser: Denoiser, sampler: Sampler, class_names: Sequence[str]) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from gentrain.export_pipeline import ClassConditionalPipeline

    network, path = denoiser.network, denoiser.path
    if not isinstance(network, ConditionalNetwork):
        raise ValueError(f"only the networks unet and dit can be exported to diffusers, this one is a {type(network).__name__}")
    if network.control is not None:
        raise ValueError("no pipeline of diffusers reads this network's control; draw samples with gentrain instead")
    if not isinstance(path.space, Free):
        raise ValueError(f"no diffusers pipeline undoes the space {path.space.registered_name}; draw samples with gentrain instead")
    scheduler, calls = sampler.diffusers_scheduler(path, denoiser.prediction), _calls(denoiser, sampler)
    if scheduler is None and calls is None:
        raise ValueError(
            f"no diffusers scheduler takes the steps of sampler {sampler.registered_name} ({sampler.steps} steps) on path "
            f"{path.registered_name} with prediction {denoiser.prediction}; sampler euler has one for rectified_flow with velocity, "
            "variance_preserving with eps, x0 or v, and variance_exploding with edm; consistency without guidance, one_step and few_step "
            "need none; draw with gentrain by others"
        )
    if getattr(sampler, "eta", 0):
        raise ValueError("a sampler that draws fresh noise on the way cannot draw the same images elsewhere; export with eta: 0")
    backbone = network.without_inputs()
    plain = network.num_classes is None and network.space_to_depth == network.time_scale == 1 and isinstance(backbone, UNet2DModel)
    if plain and isinstance(scheduler, DDIMScheduler):
        return DDIMPipeline(backbone, scheduler)
    edm = type(scheduler).__name__.startswith("EDM")  # their timesteps are log(sigma) / 4
    return ClassConditionalPipeline(
        backbone,
        scheduler,
        num_classes=network.num_classes,
        class_names={str(index): name for index, name in enumerate(class_names)},
        space_to_depth=network.space_to_depth,
        guidance_scale=sampler.guidance,
        num_inference_steps=sampler.steps,
        timestep_scale=network.time_scale * (1000.0 if edm else 1.0),
        init_noise_sigma=sampler.start(path) if edm else None,
        calls=calls,
    )


def _calls(denoiser: Denoiser, sampler: Sampler) -> list[dict[str, float]] | None:
    """What a sampler does in each call that goes to clean data, for `ClassConditionalPipeline`; None of others."""
    if isinstance(sampler, OneStep | FewStep):
        times = call_times(denoiser.path, sampler.sigma, sampler.steps)
    elif isinstance(sampler, Consistency) and sampler.guidance == 1:
        times = denoiser.path.jump_times(sampler.steps)
    else:
        return None
    return [as_affine(denoiser, float(t)) for t in times]


def _add_code(directory: Path, pipeline: type) -> None:
    """Puts the pipeline's source beside the weights and has model_index.json name it, as diffusers finds code in a directory."""
    (directory / "pipeline.py").write_text(inspect.getsource(inspect.getmodule(pipeline)), encoding="utf-8")  # type: ignore[arg-type]
    index = directory / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["_class_name"] = ["pipeline", pipeline.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cell(text: str) -> str:
    """As a cell of a Markdown table, and as text in one line elsewhere: names of classes and metrics may hold anything."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def _write_card(
    directory: Path,
    name: str,
    custom: bool,
    denoiser: Denoiser,
    sampler: Sampler,
    class_names: Sequence[str],
    licence: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    import diffusers
    from huggingface_hub import ModelCard, ModelCardData

    backbone, block = denoiser.network.backbone, denoiser.network.space_to_depth  # type: ignore[attr-defined]
    sides = backbone.config.sample_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    call = f"class_labels=[{json.dumps(class_names[0])}]" if class_names else ""
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=["gentrain"]),
        template_str=_CARD,
        cell=cell,
        name=name,
        size=f"{height * block}x{width * block}",
        classes=[cell(name) for name in class_names],
        parameters=f"{backbone.num_parameters():,}",
        gentrain=version("gentrain"),
        diffusers=diffusers.__version__,
        use=_CUSTOM_USE.format(name=name, call=call) if custom else _STOCK_USE.format(name=name, steps=sampler.steps),
        note=_CUSTOM_NOTE if custom else "",
        licence=licence,
        method=config.get("method", {}).get("name", "not recorded"),
        path=denoiser.path.registered_name,
        prediction=denoiser.prediction,
        sampler=sampler.registered_name,
        steps=sampler.steps,
        guidance=sampler.guidance,
        metrics=metrics,
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )
    card.save(directory / "README.md")
