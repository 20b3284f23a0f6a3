"""The one door to DeepSpeed: ZeRO 0-3 behind the RoleEngine contract.

What DeepSpeed lets pass silently with several engines in one process is made an error here or impossible by construction; each case has
a test in tests/distributed. Names of DeepSpeed's fp32 partitions are internal to it: pyproject.toml keeps its version range narrow.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from gentrain.config import ConfigError, option, register
from gentrain.training.engine import (
    Engine,
    EngineMisuse,
    Fragment,
    Held,
    Precision,
    ReplicatedEngine,
    RoleEngine,
    StepResult,
    as_read,
    replicated,
)
from gentrain.training.optimizers import GlobalScalars, Optimizer, Partition, decay_groups
from gentrain.training.world import World

_BUCKET = 500_000_000  # elements of gradients that DeepSpeed reduces at once; it makes room for as many, however few there are
WHOLE = 100_000  # parameters of no more elements stay whole on every rank at stage 3
_SUB_GROUP = 1_000_000_000  # elements that stage 3 steps at once

# Keys that the engine sets itself: setting them elsewhere too is how a run comes to train something else than its config says.
_OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.micro_batches",
    "gradient_clipping": "engine.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "managed_gradient_accumulation": "training.micro_batches",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer",
    "zero_optimization.compute_grad_norm": "nothing: whether a step is skipped, and what is logged, is read from the norm",
    "zero_optimization.memory_efficient_linear": "nothing: it replaces F.linear in the whole process and breaks jvp of every network",
}


@register("deepspeed")
@dataclass
class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO. Stage 1 shards optimiser state, 2 gradients too, 3 weights too. bf16 keeps float32 master weights."""

    zero_stage: Literal[0, 1, 2, 3] = option(1, "what is sharded over the ranks")
    precision: Precision = option("fp32", "weights and arithmetic; masters are float32 either way")
    gradient_clipping: PositiveFloat | None = option(1.0, "largest norm of the gradient over all parameters; null = no clipping")
    offload_optimizer: bool = option(
        False, "float32 masters, the optimiser's state and averages lie on the host, where the steps are made (ZeRO-Offload)"
    )
    settings: dict[str, Any] = option(dict, "further DeepSpeed settings, merged into its configuration")

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("bf16 needs zero_stage 1 or more: DeepSpeed's stage 0 gives other losses in bf16", key="zero_stage")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("DeepSpeed offloads optimisers at ZeRO stages 1 to 3; set zero_stage to one of them", key="offload_optimizer")
        for key, instead in _OWNED.items():
            if _has(self.settings, key):
                raise ConfigError(f"this DeepSpeed key is set by the engine; set {instead} instead", key=f"settings.{key}")

    @property
    def forward_mode(self) -> bool:
        return self.zero_stage != 3  # the functions that gather its weights have no forward derivative

    @property
    def shows(self) -> frozenset[Partition]:
        whole: frozenset[Partition] = frozenset({"elementwise", "global_scalar", "per_tensor", "matrix"})
        return whole if self.zero_stage == 0 else frozenset({"elementwise", "global_scalar"})

    @property
    def live_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def build(self, role: str, module: nn.Module, optimizer: Optimizer, world: World) -> RoleEngine:
        kinds = {0: _Stage0Engine, 1: _Stage12Engine, 2: _Stage12Engine, 3: _Stage3Engine}
        return kinds[self.zero_stage](self, role, module, optimizer, world)

    def held(self, parameters: list[nn.Parameter], optimizer: Optimizer, ranks: int, passes: int) -> Held:
        if self.zero_stage == 0:
            weights, state = replicated(parameters, optimizer)
            copies = min(weights, 4 * _BUCKET)  # flat, whatever the number of ranks
            return Held(weights, state, average=weights, buffers=0, gradients=weights, passing=copies)
        groups = [group["params"] for group in decay_groups(parameters)]
        return self._held_stage_3(groups, optimizer, ranks) if self.zero_stage == 3 else self._held_flat(groups, optimizer, ranks, passes)

    def _held_flat(self, groups: list[list[nn.Parameter]], optimizer: Optimizer, ranks: int, passes: int) -> Held:
        """Stages 1 and 2: each group flat, padded to a multiple of 2 per rank, cut into one piece per rank."""
        size, total = self.live_dtype.itemsize, sum(p.numel() for group in groups for p in group)
        each, once = optimizer.state_bytes((1,))
        pieces, own = [], [0] * ranks
        for group in groups:
            piece = 2 * -(-sum(p.numel() for p in group) // (2 * ranks))
            start = 0
            for p in group:  # a gradient is kept whole where any of it belongs to the rank
                for rank in range(start // piece, (start + p.numel() - 1) // piece + 1):
                    own[rank] += size * p.numel()
                start += p.numel()
            pieces.append(piece)
        kept, bucket = max(own), size * self._reduced_at_once(total)
        most = max(p.numel() for group in groups for p in group)
        norm = 8 * most  # of each gradient, in float64
        copy = bucket if ranks > 1 else 0  # flat, as it is reduced: when the backward has ended, or amid it where not all gradients fit in
        amid = copy if bucket < size * total else 0
        if self.offload_optimizer:
            largest = size * most  # room for a gradient on its way, here and there
            sums = kept if self.zero_stage == 2 and passes > 1 else 0  # of the passes before
            return Held(
                weights=size * ranks * sum(pieces),
                optimizer=round(each * sum(pieces)) + once * len(pieces),
                average=4 * sum(pieces),
                buffers=largest,
                gradients=0,
                passing=amid + (bucket if self.zero_stage == 2 else bucket + size * total),
                stepping=bucket + copy + norm,  # what reduces may hold the flat copy for a while
                host=(8 + size) * sum(pieces) + largest + sums,  # masters, their gradients, and what is to become weights
            )
        arriving = bucket + (kept if passes > 1 else 0) if self.zero_stage == 2 else bucket + size * total - kept
        return Held(
            weights=size * ranks * sum(pieces) + 4 * sum(pieces),
            optimizer=round(each * sum(pieces)) + once * len(pieces),
            average=4 * sum(pieces),
            buffers=0,
            gradients=kept,
            passing=arriving + amid,
            # what is kept is copied out of the bucket while what reduces may still hold the flat one; stage 2 adds it to the passes before
            stepping=max(_as_float32(size) * max(pieces), norm, bucket + copy + (kept if self.zero_stage == 2 and passes > 1 else 0)),
        )

    def _held_stage_3(self, groups: list[list[nn.Parameter]], optimizer: Optimizer, ranks: int) -> Held:
        """Each parameter cut into one piece per rank; gradients have a place of their own all the time."""
        size, parameters = self.live_dtype.itemsize, [p for group in groups for p in group]
        each, once = optimizer.state_bytes((1,))
        pieces, total = sum(-(-p.numel() // ranks) for p in parameters), sum(p.numel() for p in parameters)
        here = not self.offload_optimizer
        return Held(
            weights=sharded_bytes(parameters, size, ranks) + (4 * pieces if here else 0),
            optimizer=round(each * pieces) + once * len(groups),
            average=4 * pieces,
            buffers=size * (self._reduced_at_once(total) + (pieces if here else 0)),
            gradients=0,
            # one as it comes, and the bucket's once more, in the order of the ranks
            passing=size * (max(p.numel() for p in parameters) + self._reduced_at_once(total)),
            stepping=_as_float32(size) * min(pieces, _SUB_GROUP) if here else 0,
            host=None if here else (8 + size) * pieces,  # masters, their gradients, and the place of those as they come
        )

    def _reduced_at_once(self, elements: int) -> int:
        return int(self.deepspeed_config(elements)["zero_optimization"]["reduce_bucket_size"])

    def deepspeed_config(self, elements: int = _BUCKET) -> dict[str, Any]:
        """The configuration handed to deepspeed.initialize. Batch sizes are formal: losses and boundaries are ours.

        Args:
            elements: of the parameters that learn.
        """
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Said explicitly: left out, DeepSpeed clips at 1.0. Stage 0 is clipped by us, who need the norm before the step.
            "gradient_clipping": (self.gradient_clipping or 0.0) if self.zero_stage else 0.0,
            "zero_optimization": {
                "stage": self.zero_stage,
                "memory_efficient_linear": False,
                "reduce_bucket_size": min(elements, _BUCKET),  # for an adapter it would be 2 GB of nothing
            },
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_allow_untested_optimizer": True,  # which optimisers survive sharding is checked by Engine.shows
            "steps_per_print": None,
        }
        if self.offload_optimizer:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            config["zero_force_ds_cpu_optimizer"] = False  # its own is compiled at the first start; torch's kernel is fused on the host too
        return _merged(config, self.settings)


def _has(settings: Mapping[str, Any], key: str) -> bool:
    head, _, rest = key.partition(".")
    return head in settings and (not rest or (isinstance(settings[head], Mapping) and rest in settings[head]))


def _merged(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    both = {**config, **settings}
    return {k: {**config[k], **v} if isinstance(v, Mapping) and isinstance(config.get(k), Mapping) else v for k, v in both.items()}


def _as_float32(size: int) -> int:
    """Bytes per gradient of `size` bytes that is made flat, and then float32 where it is not."""
    return 4 if size == 4 else 4 + size


def sharded_bytes(parameters: list[nn.Parameter], itemsize: int, ranks: int) -> int:
    """Of weights that ZeRO-3 has shared out, on each rank: a piece of each parameter, and the small ones whole beside it."""
    if ranks == 1:
        return itemsize * sum(p.numel() for p in parameters)
    return sum(itemsize * (-(-p.numel() // ranks) + (p.numel() if p.numel() <= WHOLE else 0)) for p in parameters)


def shard_frozen(module: nn.Module) -> nn.Module:
    """Shares the weights of a frozen module out over the ranks (ZeRO-3); each layer's are gathered while it is used. Collective."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
        "steps_per_print": None,
    }
    sharded: nn.Module = _initialize(config, module, None).module
    return sharded


def _initialize(config: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # says on stdout that it guessed, otherwise
    os.environ.setdefault("LOCAL_RANK", "0")  # a single process that no launcher started
    import deepspeed
    import deepspeed.ops

    _import_muon()
    # torch renamed two collectives that DeepSpeed calls: one line per step otherwise.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Compiled at every start on Linux, waits without limit for the lock of a killed build, and fails without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def _import_muon() -> None:
    """Every engine imports DeepSpeed's Muon, to ask whether it is used; its decorators would take torch's compiler along, for seconds."""
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiled


class _DeepSpeedMixin(RoleEngine):
    """Forward, backward and step through a DeepSpeed engine, one backward per forward group, boundaries said explicitly."""

    deepspeed: Any
    dtype: torch.dtype

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.deepspeed(as_read(x, self.dtype), *args, **kwargs)
        return output

    def _through(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Around the engine: its forward would count as one of its own, and stages 2 and 3 would see gradients they did not ask for.
        output: Tensor = self.deepspeed.module(as_read(x, self.dtype), *args, **kwargs)
        return output

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)


class _Stage0Engine(_DeepSpeedMixin, ReplicatedEngine):
    def __init__(self, engine: DeepSpeedEngine, role: str, module: nn.Module, optimizer: Optimizer, world: World):
        super().__init__(role, module, optimizer.build(module.parameters()), world, engine.gradient_clipping)
        self.deepspeed, self.dtype = _initialize(engine.deepspeed_config(), module, self.optimizer), engine.live_dtype

    def _step(self) -> StepResult:
        result = self.clip()
        if result.applied:
            self.deepspeed.step()
        else:  # DeepSpeed checks nothing at stage 0 in fp32
            self.deepspeed.zero_grad()
        return result


class _ShardedEngine(_DeepSpeedMixin):
    sharded = True

    def __init__(self, engine: DeepSpeedEngine, role: str, module: nn.Module, optimizer: Optimizer, world: World):
        super().__init__(role, module, world, engine.gradient_clipping)
        self.dtype = engine.live_dtype
        elements = sum(p.numel() for p in module.parameters())
        self.deepspeed = _initialize(engine.deepspeed_config(elements), module, optimizer.build(module.parameters()))
        self.optimizer = self.deepspeed.optimizer.optimizer
        if isinstance(self.optimizer, GlobalScalars):
            self.optimizer.sharded = True
        self._reached: set[str] = set()  # by the backward that goes on
        self._reached_before: set[str] = set()  # by those of the same step before it
        if engine.offload_optimizer and engine.zero_stage > 1:
            for name, p in module.named_parameters():
                p.register_hook(partial(self._reach, name))

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached.add(name)

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Raises EngineMisuse where DeepSpeed would drop gradients: offloaded, what the last backward does not reach stays behind."""
        super()._backward(loss, last)
        lost = sorted(self._reached_before - self._reached) if last else []
        self._reached, self._reached_before = set(), set() if last else self._reached_before | self._reached
        if lost:
            raise EngineMisuse(
                f"the last loss of role {self.role!r} does not reach {lost[0]!r}, which an earlier one of the step does: DeepSpeed then "
                "drops its gradient; set engine.offload_optimizer to false, or engine.zero_stage to 1"
            )

    def _check_sums(self) -> None:
        """Raises ConfigError where numbers over all parameters would be over one group of them: DeepSpeed steps each by itself."""
        if isinstance(self.optimizer, GlobalScalars) and len(self.partitions) > 1:
            raise ConfigError(
                f"ZeRO steps the parameters of role {self.role!r} in {len(self.partitions)} groups, one after another, and this optimiser "
                "needs them together; set engine.zero_stage to 0, engine to torch, or take adamw",
                key="optimizer",
            )

    def _clear_padding(self) -> None:
        """What no fragment covers counts in sums over a shard, and stage 3 leaves there what the memory held."""
        for index, partition in enumerate(self.partitions):
            padding = torch.ones(partition.numel(), dtype=torch.bool, device=partition.device)
            for f in self.fragments:
                if f.partition == index:
                    padding[f.offset : f.offset + f.size] = False
            partition.detach().view(-1).masked_fill_(padding, 0)

    def _step(self) -> StepResult:
        self.deepspeed.step()
        return StepResult(float(self.deepspeed.get_global_grad_norm() or 0.0), not self.deepspeed.optimizer.overflow)


class _Stage12Engine(_ShardedEngine):
    def __init__(self, engine: DeepSpeedEngine, role: str, module: nn.Module, optimizer: Optimizer, world: World):
        super().__init__(engine, role, module, optimizer, world)
        self.partitions = list(self.deepspeed.optimizer.single_partition_of_fp32_groups)
        self.fragments = []
        self._parameters = dict(module.named_parameters())
        for name, p in self._parameters.items():
            mapping = p._hp_mapping  # type: ignore[attr-defined]  # None where another rank holds the parameter
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                self.fragments.append(Fragment(name, here.start, here.numel, mapping.param_group_index, there.start))
        self._check_sums()
        self._clear_padding()

    def _refresh(self) -> None:
        self.deepspeed.optimizer.update_lp_params()

    def _live(self, fragment: Fragment) -> list[Tensor]:
        f = fragment
        return [self._parameters[f.name].detach().view(-1)[f.start : f.start + f.size]]


class _Stage3Engine(_ShardedEngine):
    def __init__(self, engine: DeepSpeedEngine, role: str, module: nn.Module, optimizer: Optimizer, world: World):
        super().__init__(engine, role, module, optimizer, world)
        zero = self.deepspeed.optimizer
        self.partitions = list(zero.fp32_partitioned_groups_flat)
        self.fragments = []
        self._parameters = dict(module.named_parameters())
        for name, p in self._parameters.items():
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = world.rank * size  # equal slices, the last ones padded
            held = min(size, self.shapes[name].numel() - start)
            if held > 0:
                self.fragments.append(Fragment(name, start, held, group, offset))
        self._check_sums()
        self._clear_padding()

    def _refresh(self) -> None:
        zero = self.deepspeed.optimizer
        zero.checkpoint_event_prologue()  # drops the whole copies of small parameters
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # and gathers them anew

    def _live(self, fragment: Fragment) -> list[Tensor]:
        f, p = fragment, self._parameters[fragment.name]
        copies = [p.ds_tensor.data.view(-1)[: f.size]]  # type: ignore[attr-defined]
        if p.data.numel() == self.shapes[f.name].numel():  # a small one, whole on every rank
            copies.append(p.data.view(-1)[f.start : f.start + f.size])
        return copies
