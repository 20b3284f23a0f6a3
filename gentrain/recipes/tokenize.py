"""The stage `tokenize`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.latents import MANIFEST, file_digest
from gentrain.data.tokens import FILES, TOKENIZER, Manifest
from gentrain.methods.autoencoder import reconstruction_error
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.models.vq import VQNetwork, save_vq
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import write_metrics
from gentrain.recipes.features import apply_network
from gentrain.training.roles import load_network


@register("tokenize")
@dataclass
class Tokenize(Stage):
    """Makes tokens of images with a trained `vq_autoencoder`, for the data set `tokens`, which decodes with the copy that is kept here.

    metrics.json tells what is lost: the error of held-out images that went to tokens and back, and how many codes are in use.
    """

    autoencoder: str = option(help="run of the method `vq_autoencoder`")
    data: Data | None = option(None, "images; null = those that it learnt from")

    def execute(self, directory: Path) -> None:
        network, run = load_network(self.autoencoder)
        if not isinstance(network, VQNetwork):
            raise ConfigError(f"{self.autoencoder} holds a {run.method.registered_name}, not a vq_autoencoder", key="autoencoder")
        data = self.data or run.data
        try:
            data.fit()
        except ValueError as error:
            raise ConfigError(str(error), key="data") from error
        if data.captions:
            raise ConfigError(f"{data.registered_name} has captions, which tokens would lose; name data without them", key="data")
        if data.shape != run.data.shape:
            raise ConfigError(f"{self.autoencoder} learnt images of shape {run.data.shape}, not {data.shape}", key="data")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)  # whatever is killed here, it never tells of other tokens
        save_vq(network, directory / TOKENIZER)
        tokens, images = {}, {}
        for split, name in FILES.items():
            items = data.split(split)
            images[split] = torch.stack([items[index]["x"] for index in range(len(items))])
            tokens[split] = apply_network(network.encode, images[split])
            label = [items[index].get("label", torch.tensor(-1)) for index in range(len(items))]
            save_file({"x": tokens[split], "label": torch.stack(label)}, directory / name)
        manifest = Manifest(
            vocabulary=len(network.codebook),
            scales=list(network.scales) if len(network.scales) > 1 else [],
            length=tokens["train"].shape[1],
            image=list(data.shape),
            class_names=list(data.class_names),
            licence=data.licence,
            files={name: file_digest(directory / name) for name in [*FILES.values(), *_kept(directory)]},
        )
        temporary = directory / f".{MANIFEST}"
        temporary.write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, directory / MANIFEST)
        again = apply_network(network.decode, tokens["held_out"])
        metrics = _told(reconstruction_error(again, images["held_out"]), tokens["train"], manifest["vocabulary"])
        write_metrics(directory, metrics, {"autoencoder": self.autoencoder})


def _kept(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in (directory / TOKENIZER).iterdir())


def _told(error: Tensor, tokens: Tensor, vocabulary: int) -> list[Metric]:
    share = tokens.flatten().bincount(minlength=vocabulary) / tokens.numel()
    perplexity = float((-share * share.clamp(min=1e-30).log()).sum().exp())
    used = int((share > 0).sum())
    interval = bootstrap_interval(lambda sample: float(sample.mean()), error)
    return [
        Metric("reconstruction error, held out", *interval, "lower", f"mean |x - decoded(encoded(x))| of {len(error)} images in [-1, 1]"),
        Metric("codes in use", used, used, used, "higher", f"of {vocabulary}, by the tokens of the train split"),
        Metric("perplexity of the codes", perplexity, perplexity, perplexity, "higher", "exp of their entropy, same tokens"),
    ]
