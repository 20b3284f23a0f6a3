"""Training of methods with several roles in a plain loop, for the tests of few-step methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gentrain.data.toys import Mixture
from gentrain.methods.base import Clock, Follow, Frozen, Method, Trained
from gentrain.models.base import Model
from gentrain.models.denoiser import Denoiser
from gentrain.models.mlp import MLP
from gentrain.noise import Noise, derive
from gentrain.paths.base import Path
from gentrain.samplers.base import Sampler


class Line:
    """A mixture of two normal laws on the line, .3 N(-1.5, .3^2) + .7 N(1, .5^2), whose flow is known: it keeps the order of points."""

    weights, means, deviations = torch.tensor([[0.3, 0.7], [-1.5, 1.0], [0.3, 0.5]], dtype=torch.float64)

    def __init__(self, seed: int):
        self.seed = seed

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        noise, rows = Noise(derive(self.seed, "line"), indices), len(indices)
        second = noise.bernoulli(0.7, (rows,)).long()
        return {"x": (self.means[second] + self.deviations[second] * noise.normal((rows,), torch.float64)).float()[:, None]}

    def share_below(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """The distribution function of x_t = alpha x0 + sigma eps, of x [B] float64; alpha, sigma [B] or numbers."""
        alpha, sigma = (torch.as_tensor(each, dtype=torch.float64).reshape(-1, 1) for each in (alpha, sigma))
        deviation = (alpha**2 * self.deviations**2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr((x[:, None] - alpha * self.means) / deviation)).sum(1)

    def quantile(self, share: Tensor) -> Tensor:
        """Its inverse for the data, by bisection: [B] float64 -> [B]."""
        low, high = torch.full_like(share, -8.0), torch.full_like(share, 8.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.share_below(middle, 1.0, 0.0) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Group:
    """The roles' networks as losses see them, and their training by Adam with a learning rate that falls to zero.

    `weights`: role -> state to begin from; inputs that it lacks stay as they are. Other roles begin as their `init` says.
    """

    def __init__(
        self, method: Method, path: Path, prediction: Any, weights: dict[str, dict[str, Tensor]], lr: float, steps: int,
        model: Model, shape: tuple[int, ...], classes: int,
    ):  # fmt: skip
        self.method, self.steps, self.modules = method, steps, {}
        self.nets = SimpleNamespace()
        for name, role in method.roles.items():
            module = (role.model or model).build(shape, classes)
            if role.inputs:
                module.add_inputs(role.inputs)
            start = weights.get(name) or (weights.get(role.init) or self.modules[role.init].state_dict() if role.init else {})
            module.load_state_dict(start, strict=False)
            self.modules[name] = module.requires_grad_(not isinstance(role, Frozen))
            setattr(self.nets, name, Denoiser(module, path, prediction) if role.denoiser else module)
        learning = {name: module for name, module in self.modules.items() if isinstance(method.roles[name], Trained)}
        self.optimizers = {name: torch.optim.Adam(module.parameters(), lr=lr, fused=True) for name, module in learning.items()}
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        self.schedules = [cosine(optimizer, steps) for optimizer in self.optimizers.values()]

    def step(self, number: int, batch: dict[str, Tensor], rows: Tensor, seed: int) -> dict[str, float]:
        count, logs = len(rows), {}
        for index, update in enumerate(self.method.updates(Clock(number * count, count, self.steps * count))):
            if isinstance(update, Follow):
                with torch.no_grad():
                    for p, q in zip(self.modules[update.role].parameters(), self.modules[update.of].parameters(), strict=True):
                        p.lerp_(q, 1 - update.decay)
                continue
            for name, module in self.modules.items():
                module.requires_grad_(name == update.role)
            for compute in update.losses:
                loss = compute(self.nets, batch, Noise(derive(seed, "noise", index), rows))
                loss.value.backward()
                logs[update.role] = loss.value.item()
            nn.utils.clip_grad_norm_(self.modules[update.role].parameters(), 1.0)
            self.optimizers[update.role].step()
            self.optimizers[update.role].zero_grad()
        for schedule in self.schedules:
            schedule.step()
        return logs

    @property
    def generator(self) -> Denoiser:
        return getattr(self.nets, self.method.generator)


def train(
    method: Method,
    path: Path,
    prediction: Any,
    seed: int,
    steps: int,
    weights: dict[str, dict[str, Tensor]] | None = None,
    lr: float = 2e-3,
    batch: int = 256,
    model: Model | None = None,
    line: Line | None = None,
    average: float = 0.0,
) -> Denoiser:
    """The method's generator, trained on the mixture of eight normal laws, or on `line`; `average`: decay per step of its average."""
    torch.manual_seed(derive(seed, "weights"))
    group = Group(method, path, prediction, weights or {}, lr, steps, model or MLP(), *(((2,), 8) if line is None else ((1,), 0)))
    averaged = AveragedModel(group.generator.network, multi_avg_fn=get_ema_multi_avg_fn(average))
    items = Mixture(seed=seed).split("train") if line is None else line
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch)
        group.step(step, items.batch(rows), rows, seed)
        averaged.update_parameters(group.generator.network)
    return Denoiser(averaged.module, path, prediction)


def draw(denoiser: Denoiser, sampler: Sampler, labels: Tensor, seed: int) -> Tensor:
    with torch.no_grad():
        noise = Noise(derive(seed, "sample"), torch.arange(len(labels)))
        return sampler.sample(denoiser, (len(labels), 2), noise, {"label": labels})


class Split(nn.Module):
    """A network whose calls number `frozen`, counted from 0, are made by a copy that is held fixed."""

    def __init__(self, network: nn.Module, frozen: tuple[int, ...]):
        super().__init__()
        self.live, self.fixed, self.frozen, self.calls = network, copy.deepcopy(network).requires_grad_(False), frozen, 0

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        network = self.fixed if self.calls in self.frozen else self.live
        self.calls += 1
        return network(x, t, condition)


def gradients_hold_calls_fixed(loss_of: Callable[[nn.Module], Tensor], network: nn.Module, frozen: tuple[int, ...]) -> int:
    """Asserts that the loss' gradient is the one with the calls `frozen` made by a constant; how many calls the loss made."""
    loss_of(network).backward()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    split = Split(network, frozen)
    loss_of(split).backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    return split.calls
