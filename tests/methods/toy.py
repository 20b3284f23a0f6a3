"""What the tests of methods share."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path


class TinyNetwork(nn.Module):
    """For [B, 2], three classes and the null class; remembers the labels it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label = nn.Embedding(4, 8)
        self.layers = nn.Sequential(nn.Linear(11, 32), nn.SiLU(), nn.Linear(32, 2))
        self.seen: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        self.seen.append(None if condition is None else condition["label"])
        label = torch.full((len(x),), 3) if condition is None else condition["label"] % 4  # -1 is the last entry
        return self.layers(torch.cat([x, t[:, None] / 1000, self.label(label)], 1))


def nets_with(network: nn.Module, path: Path, prediction: Prediction) -> SimpleNamespace:
    return SimpleNamespace(model=Denoiser(network, path, prediction))


def batch_of(count: int, start: int = 0) -> dict[str, Tensor]:
    rows = torch.arange(start, start + count)
    return {"x": Noise(9, rows).normal((count, 2)) * 0.5, "label": rows % 3}


def noise_of(count: int, start: int = 0) -> Noise:
    return Noise(1, torch.arange(start, start + count))


def clusters_of(count: int, start: int = 0) -> dict[str, Tensor]:
    """Three narrow classes on a circle: something to learn beyond the mean and the deviation, which are 0 and 0.5."""
    batch = batch_of(count, start)
    angle = batch["label"] * (2 * torch.pi / 3)
    return {"x": torch.stack([angle.cos(), angle.sin()], 1) * 0.7 + batch["x"] * 0.1, "label": batch["label"]}


def fall_of(method: Any, path: Path, prediction: Prediction) -> float:
    """Loss of the last ten of 60 steps over that of the first ten."""
    network = TinyNetwork()
    optimizer, nets, losses = torch.optim.Adam(network.parameters(), lr=1e-2), nets_with(network, path, prediction), []
    for step in range(60):
        loss = method.loss(nets, clusters_of(256, 256 * step), noise_of(256, 256 * step)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / sum(losses[:10])
