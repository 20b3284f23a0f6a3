"""Export of trained towers, image and text, as a SigLIP of transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gentrain.export import appearing, refuse_present
from gentrain.models.image_text import PREPROCESSING, Side, local_file
from gentrain.models.towers import Locked, Towers, TwoTowers

_CARD = """---
{{ card_data }}
---
# {{ name }}

Compares images and texts: a SigLIP, trained on from `{{ image }}` (images) and `{{ text }}` (texts) with gentrain {{ gentrain }}.

## Use
Replace `{{ name }}` by the path of this directory. Needs transformers (written by {{ transformers }}), not gentrain.
```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{{ name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")  # padding="max_length", as SigLIP was trained
```

## Data
{{ licence }} What it began with has a licence of its own, which goes on to hold.

## Configuration
```yaml
{{ config }}```
"""


def export_towers(out: Path, towers: TwoTowers, model: Towers, *, licence: str, config: Mapping[str, Any]) -> Path:
    """Writes a SiglipModel, its tokenizer and what its images are, and returns the directory's path.

    The temperature is what the loss took of it: at most 100.

    Args:
        out: must not exist, or be an empty directory; it appears whole or not at all.
        licence, config: as for `export`.

    Raises:
        FileExistsError: `out` is there and not an empty directory. OSError: it cannot be written.
        ValueError: a side is no SigLIP's, or has a projection on top, which SiglipModel has no place for.
    """
    refuse_present(out)
    image, text = _of_siglip(model, "image"), _of_siglip(model, "text")
    from transformers import AutoTokenizer, SiglipConfig, SiglipModel

    whole = SiglipModel(SiglipConfig(text_config=text.config.to_dict(), vision_config=image.config.to_dict()))
    whole.vision_model.load_state_dict(_network(towers.image).state_dict())
    whole.text_model.load_state_dict(_network(text.tower() if model.lock == "text" else towers.text).state_dict())
    with torch.no_grad():
        whole.logit_scale.copy_(towers.logit_scale.clamp(max=math.log(100)))
        whole.logit_bias.copy_(towers.logit_bias)
    with appearing(out) as partial:
        whole.save_pretrained(partial)
        AutoTokenizer.from_pretrained(text.path, revision=text.revision, local_files_only=True).save_pretrained(partial)
        shutil.copyfile(local_file(image.path, image.revision, PREPROCESSING), partial / PREPROCESSING)
        _write_card(partial, out.name, image, text, licence, config)
    return out


def _of_siglip(model: Towers, which: Any) -> Side:
    side = model.pretrained(which)
    if side is None or side.kind != "siglip":
        raise ValueError(f"the {which} tower is no SigLIP's, and SiglipModel of transformers holds no other; use the run itself")
    if side.width != model.entries:
        raise ValueError(f"the {which} tower has a projection from {side.width} to {model.entries} entries, which SiglipModel has not")
    return side


def _network(tower: nn.Module) -> nn.Module:
    """What transformers' class held of it."""
    network: nn.Module = (tower.network if isinstance(tower, Locked) else tower).network  # type: ignore[assignment]
    return network


def _write_card(directory: Path, name: str, image: Side, text: Side, licence: str, config: Mapping[str, Any]) -> None:
    import transformers
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="zero-shot-image-classification", tags=["gentrain"]),
        template_str=_CARD,
        name=name,
        image=image.directory,
        text=text.directory,
        gentrain=version("gentrain"),
        transformers=transformers.__version__,
        licence=licence,
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )
    card.save(directory / "README.md")
