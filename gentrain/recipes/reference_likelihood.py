"""The stage `reference_likelihood`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data, TensorItems
from gentrain.data.pool import Pool, rows_digest
from gentrain.data.tokens import TokenData
from gentrain.methods.base import condition_of
from gentrain.models.adapters import digest_of
from gentrain.models.denoiser import drop_condition
from gentrain.models.tokens import TokenModel
from gentrain.recipes.base import Stage
from gentrain.training.roles import load_network, load_weights

BATCH = 100


@register("reference_likelihood")
@dataclass
class ReferenceLikelihood(Stage):
    """Asks a token model once how likely each token of the data and of a pool is, with its label and with the null class.

    A run of `token_ddo` that names the output as `method.known` never asks its reference again. data.safetensors and fake.safetensors, with
    the digests of the weights and of the tokens in their heads.
    """

    run: str = option(help="the run that is the reference")
    pool: str = option(help="the stage `generate` that drew from it")
    data: Data | None = option(None, "tokens; null = those that the run learnt from")

    def execute(self, directory: Path) -> None:
        model, run = load_network(self.run)
        data = self.data or run.data
        if not isinstance(model, TokenModel) or not isinstance(data, TokenData):
            raise ConfigError(f"{self.run} holds a {run.method.registered_name}; only what a token model says of a row is fixed", key="run")
        data.fit()
        items = data.split("train")
        if not isinstance(items, TensorItems):
            raise ConfigError(f"{data.registered_name} has no end; name tokens that a stage `tokenize` made", key="data")
        weights, pool = digest_of(load_weights(self.run)), Pool(self.pool, "reference", "pool")
        pool.require(weights)
        directory.mkdir(parents=True, exist_ok=True)
        for name, each in {"data": items, "fake": pool.items(tuple(data.shape), len(data.class_names), data.vocabulary)}.items():
            found = [_asked(model, each.batch(rows)) for rows in torch.arange(len(each)).split(BATCH)]
            said = {key: torch.cat(values).contiguous() for key, values in zip(("log_prob", "null_log_prob"), zip(*found))}
            save_file(said, directory / f"{name}.safetensors", {"weights": weights, "rows": rows_digest(each)})


def _asked(model: TokenModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of each token [B, T] with the labels, and with the null class."""
    condition = condition_of(batch)
    assert condition is not None
    null = drop_condition(condition, torch.ones(len(batch["x"]), dtype=torch.bool))
    with torch.no_grad():
        return model.token_log_prob(batch["x"], condition).float(), model.token_log_prob(batch["x"], null).float()
