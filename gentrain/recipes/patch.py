"""The stage `patch`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, StringConstraints
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.export_pretrained import pretrained_network
from gentrain.images import save_grid
from gentrain.models.pretrained import PretrainedNetwork
from gentrain.recipes.base import Stage
from gentrain.recipes.export import CARD, Export
from gentrain.recipes.generate import GRID
from gentrain.training.roles import load_network

PATCH = "patch.json"

_CARD = """
## Patch {version}
For a pipeline that is already deployed: `{denoiser}` of `{origin}` (SHA-256 of its files {digest}). The name of the adapter is its version.
```python
pipeline.load_lora_weights("{name}", adapter_name="{adapter}")  # apply; needs peft
pipeline.delete_adapters("{adapter}")                           # roll back
```
Checked as it was written, in diffusers, on {count} prompts with the same noise: with the patch the images differ by {changed:.3g} of the
range on average, rolled back they are the former ones, bit for bit. `grid.png` has a row before, one with the patch, one rolled back.
"""


@register("patch")
@dataclass
class Patch(Stage):
    """The adapter of a run as a patch for the deployed pipeline: LoRA weights with a version, a card, and a check that it comes off again.

    The check loads the pipeline in diffusers, draws, applies the patch, draws, rolls it back and draws: patch.json, grid.png.
    """

    run: str = option(help="run that learnt an adapter on a pipeline")
    version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")] = option(help="of the patch, such as 1.0.0")
    prompts: list[str] = option(help="to check it with: some that were to be forgotten, some that were not")
    steps: PositiveInt = option(20, "of the pipeline's own scheduler, in the check")
    guidance: NonNegativeFloat = option(3.0, "in the check")
    seed: NonNegativeInt = option(0, "of the check's noise")
    scores: str | None = option(None, "directory of an evaluate or unlearning stage, for the card")
    gate: str | None = option(None, "directory of a stage `unlearning` whose conditions must be met")
    force: bool = option(False, "write what does not meet them; the card says so")

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("give at least one", key="prompts")

    def execute(self, directory: Path) -> None:
        """Raises ConfigError when there is no adapter, when the gate is not met, or when the check fails."""
        loaded, _ = load_network(self.run)
        network = pretrained_network(getattr(loaded, "network", loaded))
        if network is None:
            raise ConfigError(f"{self.run} learnt on no pipeline of diffusers", key="run")
        family, adapter = network.family, f"v{self.version.replace('.', '_')}"  # peft takes no dots
        Export(self.run, form="adapter", scores=self.scores, gate=self.gate, force=self.force).execute(directory)
        before, patched, after = self._check(network, directory, adapter)
        changed, restored = (patched - before).abs().mean().item() / 2, torch.equal(before, after)
        if not restored or changed == 0:
            what = "does not come off again: the images stay changed" if not restored else "changes nothing"
            raise ConfigError(f"the patch {what}; train it again", key="run")
        save_grid(torch.cat([before, patched, after]), directory / GRID, len(self.prompts))
        digest = family.source.digest((family.denoiser,))
        told = {
            "version": self.version, "adapter": adapter, "pipeline": family.source.name, "component": family.denoiser,
            "sha256": digest, "check": {"prompts": self.prompts, "seed": self.seed, "changed": changed, "rolled_back": restored},
        }  # fmt: skip
        (directory / PATCH).write_text(json.dumps(told, indent=1))
        section = _CARD.format(
            version=self.version, denoiser=family.denoiser, origin=family.source.name, digest=digest[:12], name=directory.name,
            adapter=adapter, count=len(self.prompts), changed=changed,
        )  # fmt: skip
        card = directory / CARD
        card.write_text(card.read_text(encoding="utf-8").replace("\n## Data\n", f"{section}\n## Data\n", 1), encoding="utf-8")

    def _check(self, network: PretrainedNetwork, directory: Path, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, C, H, W] of the pipeline as it is, with the patch, and rolled back."""
        pipeline = network.family.source.pipeline()
        if not hasattr(pipeline, "load_lora_weights"):
            raise ConfigError(f"{type(pipeline).__name__} takes no LoRA weights; export the whole pipeline", key="run")
        pipeline.set_progress_bar_config(disable=True)
        before = self._drawn(pipeline)
        pipeline.load_lora_weights(str(directory), adapter_name=adapter)
        patched = self._drawn(pipeline)
        pipeline.delete_adapters(adapter)
        return before, patched, self._drawn(pipeline)

    def _drawn(self, pipeline: Any) -> Tensor:
        images = pipeline(
            prompt=self.prompts, num_inference_steps=self.steps, guidance_scale=self.guidance, generator=torch.manual_seed(self.seed),
            output_type="pt",
        ).images  # fmt: skip
        return images.float().cpu() * 2 - 1
