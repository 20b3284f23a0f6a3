"""Runs that the tests of the engine share: a method with two roles that learn, a network with dropout, and how ranks train a list of jobs.

In a module of its own, so that spawned ranks can import it by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gentrain.config import Document, Fraction, option, register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.models.base import Condition, Model
from gentrain.noise import Noise
from gentrain.training.callbacks import Callback, MetricsFile
from gentrain.training.engine import EngineMisuse, RoleEngine
from gentrain.training.loop import Trainer, train
from gentrain.training.run import CHECKPOINTS, METRICS, RunConfig, parse_run
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World

TIMES = ("seconds", "samples_per_second")  # what no two runs share
ENGINES: dict[str, Any] = {"torch": "torch"} | {f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)}


@register("relay")
@dataclass
class Relay(Method):
    """A student learns through a frozen teacher and through a critic that learns too; each update has two losses."""

    roles: ClassVar[dict[str, Role]] = {
        "teacher": Frozen(),
        "critic": Trained(denoiser=False),
        "student": Trained(init="teacher", ema=True),
        "reference": Frozen(init="student"),
    }
    generator: ClassVar[str | None] = "student"

    train_critic: bool = option(True, "False: the critic only passes gradients on")
    nan_from: int = option(0, "the critic's loss is not a number on batches that hold a sample in [nan_from, nan_until)")
    nan_until: int = option(0, "see nan_from")

    def updates(self, clock: Clock) -> Iterator[Update]:
        if self.train_critic:
            yield Update("critic", self.critic_real, self.critic_fake)
        yield Update("student", self.student_through_teacher, self.student_through_critic)

    def _generate(self, nets: Nets, batch: Batch, noise: Noise) -> Tensor:
        z = noise.normal(tuple(batch["x"].shape))
        return nets.student.x0(z, torch.ones(len(z)), condition_of(batch))

    def critic_real(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        t = noise.uniform((len(batch["x"]),))
        value = (nets.critic(batch["x"], t, condition_of(batch)) - 1).square().mean()
        poisoned = ((self.nan_from <= batch["index"]) & (batch["index"] < self.nan_until)).any()
        return Loss(value * float("nan") if poisoned else value, {"critic_real": value})

    def critic_fake(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        t = noise.uniform((len(batch["x"]),))
        with torch.no_grad():  # a forward of the stepped role itself, too, that no backward may reach
            fake = self._generate(nets, batch, noise)
            level = nets.critic(batch["x"], t, condition_of(batch)).mean()
        return Loss(nets.critic(fake, t, condition_of(batch)).square().mean() + 0.1 * level)

    def student_through_teacher(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        fake = self._generate(nets, batch, noise)
        t = noise.uniform((len(fake),), 0.1, 0.9)
        x_t = nets.teacher.path.perturb(fake, noise.normal(tuple(fake.shape)), t)
        towards = nets.teacher.x0(x_t, t, condition_of(batch)) - nets.reference.x0(x_t.detach(), t, condition_of(batch))
        return Loss((fake - batch["x"]).square().mean() + towards.square().mean() + nets.teacher.x0(x_t, t, None).square().mean())

    def student_through_critic(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        fake = self._generate(nets, batch, noise)
        value = (nets.critic(fake, noise.uniform((len(fake),)), condition_of(batch)) - 1).square().mean()
        return Loss(value, {"global_x": nets.group.mean(fake.mean())})


@register("dropout_mlp")
@dataclass
class DropoutMLP(Model):
    """Has dropout, a buffer, a parameter that no forward uses and odd sizes, so that every partition is padded."""

    dropout: Fraction = option(0.1, "probability that a hidden unit is dropped while its role learns")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return _DropoutNetwork(shape[0], num_classes, self.dropout)


class _DropoutNetwork(nn.Module):
    def __init__(self, dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.labels = nn.Embedding(num_classes + 1, 7)
        self.input = nn.Linear(dim + 1, 7)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Linear(7, 11), nn.SiLU(), nn.Linear(11, 7), nn.SiLU())
        self.output = nn.Linear(7, dim)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor([0.001]))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        dtype = self.input.weight.dtype
        label = torch.full((len(x),), self.labels.num_embeddings - 1) if condition is None else condition["label"]
        label = torch.where(label < 0, self.labels.num_embeddings - 1, label)
        hidden = self.input(torch.cat([x.to(dtype), (t * self.scale).to(dtype)[:, None]], 1)) + self.labels(label)
        return self.output(self.hidden(hidden))


def values(output: Path, method: dict[str, Any] | str = "relay", engine: dict[str, Any] | str = "torch", **training: Any) -> dict[str, Any]:
    """The configuration of a run of 6 steps, every step logged."""
    engine = {"name": engine} if isinstance(engine, str) else engine
    return {
        "method": method,
        "data": {"name": "rings", "rings": 3},
        "model": "dropout_mlp",
        "engine": {"gradient_clipping": 0.5, **engine},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 36, "final": 0.1},
        "training": {
            "samples": 72, "batch_size": 12, "micro_batches": 2, "log_every": 12, "checkpoint_every": 1_000_000,
            "ema_half_life": 30, "ema_warmup": 0, **training,
        },
        "seed": 5,
        "output": str(output),
    }  # fmt: skip


def run_of(settings: dict[str, Any]) -> RunConfig:
    return parse_run(Document(settings, "test"))


@dataclass
class Job:
    """One call of `train`. stop_at: steps after which rank `stop_rank` alone asks to stop."""

    settings: dict[str, Any]
    stop_at: int | None = None
    stop_rank: int = 0
    trace: bool = False


class Trace(Callback):
    """Gathers the weights and averages before the first step and after every one, and whether a foreign role ever held a gradient."""

    def __init__(self, trainer: Trainer):
        self.weights: list[dict[str, dict[str, Tensor]]] = []
        self.ema: list[dict[str, dict[str, Tensor]]] = []
        self.leaked = False
        self.frozen = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in trainer.roles.frozen.items()}
        self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        engines = trainer.roles.engines
        self.weights.append({name: engine.weights() for name, engine in engines.items()})
        self.ema.append({name: engine.ema_weights() for name, engine in engines.items() if engine.ema is not None})
        idle = list(trainer.roles.frozen.values())
        if not getattr(trainer.run.method, "train_critic", True):
            idle.append(engines["critic"].module)
        self.leaked |= any(p.grad is not None for module in idle for p in module.parameters())
        for name, module in trainer.roles.frozen.items():
            self.leaked |= any(not torch.equal(v, self.frozen[name][k]) for k, v in module.state_dict().items())

    def on_end(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            torch.save({"weights": self.weights, "ema": self.ema, "leaked": self.leaked}, trainer.run.directory / "trace.pt")


def train_all(world: World, jobs: list[Job]) -> list[tuple[str, str]]:
    """What each job came to on this rank: (outcome, "") or (exception type, message)."""
    return [_train(world, job) for job in jobs]


def _train(world: World, job: Job) -> tuple[str, str]:
    run = run_of(job.settings)
    run.directory.mkdir(parents=True, exist_ok=True)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return job.stop_at is not None and world.rank == job.stop_rank and asked > job.stop_at

    try:
        return train(run, world, should_stop, [MetricsFile, Trace] if job.trace else [MetricsFile]).value, ""
    except Exception as error:  # compared by the test
        return type(error).__name__, str(error)


def records(directory: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def newest(directory: Path) -> Path:
    """The directory of a run's newest checkpoint."""
    storage = LocalStorage(directory / CHECKPOINTS)
    name = storage.latest()
    assert name is not None
    return storage.root / name


def state_of(directory: Path, name: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the newest unless named, whole, by file stem and name."""
    with LocalStorage(directory / CHECKPOINTS).open(name or newest(directory).name) as checkpoint:
        checkpoint.verify()
        stems = sorted({file.rsplit(".", 2)[0] for file in checkpoint.hashes if file.endswith(".safetensors")})
        return {f"{stem}/{key}": value for stem in stems for key, value in checkpoint.shards(stem).whole().items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two states, relative to the largest entry of each tensor (absolute below 1e-3)."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(((a[k].double() - b[k].double()).abs().max() / max(a[k].abs().max().item(), 1e-3)).item() for k in a)


def record_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """Largest relative difference of two files of metrics (absolute below 1e-2)."""
    assert [list(line) for line in a] == [list(line) for line in b]
    return max(abs(x[k] - y[k]) / max(abs(x[k]), 1e-2) for x, y in zip(a, b, strict=True) for k in x)


def runs_apart(a: Path, b: Path) -> float:
    """Largest relative difference of two runs, in what they told and in their newest checkpoints."""
    return max(record_difference(records(a), records(b)), difference(state_of(a), state_of(b)))


def train_and_misuse(world: World, jobs: list[Job], engines: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, dict[str, str]]]:
    """`train_all`, then what each engine says to each misuse (engine -> misuse -> message, "" where it kept silent)."""
    return train_all(world, jobs), {name: misuses(world, engine) for name, engine in engines.items()}


def misuses(world: World, engine: Any) -> dict[str, str]:
    """What an engine says to each way of training something else than the method says, "" where it kept silent."""
    linear = torch.nn.functional.linear
    run = run_of(values(Path("unused"), "flow_matching", engine))
    x, t = torch.randn(4, 2), torch.rand(4)
    messages = {}
    for misuse in (_no_gradient, _two_backwards, _backwards_out_of_order, _no_forward, _after_the_last, _step_too_early, _no_average):
        built = run.engine.build("model", run.model.build((2,), 3).to(run.engine.live_dtype), run.optimizer, world)
        try:
            misuse(built, x, t)
            messages[misuse.__name__] = ""
        except EngineMisuse as error:
            messages[misuse.__name__] = str(error)
    messages["_replaced_linear"] = "kept" if torch.nn.functional.linear is linear else ""
    return messages


def _no_gradient(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    engine(x, t)
    engine.backward(engine(x, t).detach().mean(), last=True)


def _two_backwards(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    output = engine(x, t)
    first, second = output.mean(), output.square().mean()
    engine.backward(first, last=False)
    engine.backward(second, last=True)


def _backwards_out_of_order(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    first, second = engine(x, t).mean(), engine(x, t).square().mean()
    engine.backward(first, last=False)
    engine.backward(second, last=True)


def _no_forward(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    engine.backward(torch.ones(2, requires_grad=True).sum(), last=True)


def _after_the_last(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    engine.backward(engine(x, t).mean(), last=True)
    engine.backward(engine(x, t).mean(), last=True)


def _step_too_early(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    engine.backward(engine(x, t).mean(), last=False)
    engine.step(0.1)


def _no_average(engine: RoleEngine, x: Tensor, t: Tensor) -> None:
    engine.update_ema(0.9)
