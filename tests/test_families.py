"""Every family is distilled to one step and made to forget, and given back to diffusers: the methods know none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.recipes.export import Export
from gentrain.training.roles import load_network
from tests.models.pipelines import PIPELINES, SIDE, SIDES
from tests.test_export_pretrained import drawn, reloaded, settings, trained


def distilled(root: Path, family: str) -> dict[str, Any]:
    """A teacher and two adapters on one network below."""
    return settings(root, family, "run", method={"name": "distribution_matching", "generator_loss": "dmd", "guidance": 2.0})


def forgetful(root: Path, family: str) -> dict[str, Any]:
    """A concept of those that take prompts, a class of the others."""
    (root / "prompts.txt").write_text("a cat\na dog\na bus\ncat\n")
    prompts = {"name": "prompts", "path": str(root / "prompts.txt"), "size": SIDES.get(family, SIDE)}
    concept = {"name": "concepts", "prompts": prompts, "concepts": {"cat": {"words": ["cat"], "replace": "dog"}}}
    method: dict[str, Any] = {"name": "esd", "steps": 2}
    if family == "dit":
        return settings(root, family, "run", method=method | {"forget": 0})
    return settings(root, family, "run", method=method, data=concept)


@pytest.mark.parametrize("what", [distilled, forgetful], ids=["distilled", "forgetful"])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_family_is_changed_and_given_back(tmp_path: Path, family: str, what: Any) -> None:
    values = what(tmp_path, family) | {"adapter": {"rank": 2, "targets": ["attention"]}}
    values["training"] = {"samples": 4, "batch_size": 2, "log_every": 2}
    run = trained(values)
    network: Any = load_network(run)[0].network
    weights = network.merged()
    out = Export(run=str(run)).write(tmp_path / "out")
    exported, original = reloaded(out), reloaded(tmp_path / family)
    name = network.base.network.family.denoiser
    after, side = drawn(exported, SIDES.get(family, SIDE)), SIDES.get(family, SIDE)
    assert torch.isfinite(after).all() and not torch.equal(after, drawn(original, side))
    getattr(original, name).load_state_dict({key.removeprefix("backbone."): value for key, value in weights.items()})
    assert torch.equal(after, drawn(original, side))
