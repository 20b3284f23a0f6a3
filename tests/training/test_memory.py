"""What a plan says of memory, against one process that trains, and what it says to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gentrain.methods.base import Batch, Loss, Nets
from gentrain.noise import Noise
from gentrain.training.activations import LiveTensors, SavedTensors, storage_of
from gentrain.training.memory import Memory, Planner, memory_of
from gentrain.training.optimizers import SGD, AdamW, Optimizer
from gentrain.training.run import RunConfig
from gentrain.training.world import World, join, leave
from tests.distributed.cases import Relay, run_of
from tests.distributed.memory_cases import measure_all, settings
from tests.distributed.test_memory import NORMS


@pytest.fixture(scope="module")
def alone() -> Any:
    yield join()
    leave()


ENGINES = ["torch", "torch-bf16", "zero0", "zero1", "zero1-bf16", "zero2-bf16", "zero3", "zero1-offload", "zero2-offload", "zero3-offload"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_tells_what_a_process_holds(alone: World, engine: str) -> None:
    found, memory = measure_all(alone, {engine: settings(engine)})[engine], memory_of(run_of(settings(engine)))
    assert [part.name for part in memory.parts] == ["teacher", "critic", "student", "reference"]
    assert memory.resting + memory.host == pytest.approx(found.resting, rel=1e-3)
    for part in memory.parts[1:3]:
        assert part.held is not None and part.activations is not None and part.activations.assumed == ""
        assert part.held.gradients == pytest.approx(found.gradients[part.name], rel=0.01, abs=NORMS if part.host else 100)
        assert part.activations.saved == pytest.approx(found.saved[part.name], rel=0.01)
        assert part.activations.peak >= part.activations.saved
        # never less than there is, and little more; at stage 3 gloo makes room for what it reduces once more
        gloo = {"zero3": part.held.buffers // 2, "zero3-offload": part.held.buffers}.get(engine, 0)
        assert 0.999 < (part.learning + gloo) / found.peak[part.name] < 1.2


def test_roles_that_share_weights_are_counted_once(alone: World) -> None:
    each = settings("torch", adapted=True)
    found, memory = measure_all(alone, {"": each})[""], memory_of(run_of(each))
    assert [part.name for part in memory.parts] == ["below teacher, critic, student, reference", "critic", "student"]
    assert memory.resting == pytest.approx(found.resting, rel=1e-3)
    assert memory.peak == memory.resting + max(part.learning for part in memory.parts[1:])  # one role learns at a time


def test_each_average_is_counted() -> None:
    one, three = (memory_of(run_of(settings("torch", power_ema=lengths))) for lengths in ([], [0.05, 0.1]))
    for before, after in zip(one.parts, three.parts, strict=True):
        more = 2 * before.held.average if before.held is not None and before.averaged else 0
        assert after.resting - before.resting == more
    assert three.resting > one.resting


def test_saved_tensors_are_counted_once_and_as_long_as_they_are_kept() -> None:
    x, weight = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    with SavedTensors({storage_of(weight)}) as saved:
        y = x.exp()  # keeps its result, 40 bytes
        z = (y * weight).square()  # y again, and the product
        assert saved.bytes() == 80
        z.sum().backward()
        assert saved.bytes() == 0


def test_what_is_made_counts_as_long_as_it_lives() -> None:
    with FakeTensorMode():
        x = torch.empty(10)
        with LiveTensors({storage_of(x)}) as made:
            for _ in range(5):
                x = x + 1  # 40 bytes, beside those of the one before
        assert (made.live, made.peak) == (40, 80)


@pytest.mark.parametrize(("optimizer", "each", "once"), [(AdamW(), 8, 4), (SGD(momentum=0.9), 4, 0), (SGD(momentum=0.0), 0, 0)])
def test_state_of_optimisers(optimizer: Optimizer, each: float, once: int) -> None:
    assert optimizer.state_bytes((64,)) == optimizer.state_bytes((16, 4)) == (each, once)


def test_a_loss_that_looks_at_the_networks_numbers_is_replaced_by_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(self: Relay, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        value = nets.critic(batch["x"], torch.ones(len(batch["x"])), None).mean()
        return Loss(value if value > 0 else -value)

    monkeypatch.setattr(Relay, "critic_real", looks)
    critic = memory_of(run_of(settings("torch"))).parts[1]
    assert critic.activations is not None and critic.activations.saved > 0
    monkeypatch.setattr(Relay, "critic_fake", looks)
    critic = memory_of(run_of(settings("torch"))).parts[1]
    assert critic.activations is not None and critic.activations.assumed.startswith("of one forward and backward of its network alone")


# --- what to change ----------------------------------------------------------------------------------------------------------


def planned(run: RunConfig, *, share: float) -> tuple[list[str], Memory, int]:
    planner = Planner()
    limit = int(planner.memory(run).peak * share)
    return *planner.remedy(run, limit), limit


def test_the_first_change_that_is_enough_is_named() -> None:
    run = run_of(settings("zero0", 2, batch_size=12_000, micro_batches=1))
    told, memory, limit = planned(run, share=0.99)  # activations are nearly all of it
    assert told == ["training.micro_batches=2"] and memory.peak <= limit
    run = run_of(settings("zero0", 2, batch_size=2, micro_batches=1))  # one row per process: nothing to portion
    told, memory, limit = planned(run, share=0.92)
    assert told == ["engine.zero_stage=1"] and memory.peak <= limit
    told, memory, limit = planned(run, share=0.01)
    # stage 3 would hold more than it shares out of so small a network: it is left out
    assert memory.peak > limit and "zero_stage: 1" in told[1] and "offload_optimizer: true" in told[1]
    assert told[2] == "engine.precision=bf16"


def test_changes_that_would_be_refused_are_not_named() -> None:
    run = run_of(settings("zero1-bf16", batch_size=1, micro_batches=1))  # no stage 0 in bf16, and nobody to share with
    assert planned(run, share=0.5)[0] == ["engine.offload_optimizer=true"]
    muon = settings("torch", 2, batch_size=2, micro_batches=1) | {"optimizer": {"name": "muon"}}  # needs whole matrices
    told = " ".join(planned(run_of(muon), share=0.01)[0])
    assert told and not any(f"zero_stage: {stage}" in told for stage in (1, 2, 3))


def test_offloaded_weights_lie_on_the_host_and_pass_through() -> None:
    plain = settings("torch")
    there = memory_of(run_of(plain | {"roles": {"teacher": {"placement": "offloaded"}}}))
    here = memory_of(run_of(plain))
    teacher = here.parts[0].weights
    assert there.host == teacher and there.resting == here.resting - teacher and there.peak == here.peak


def test_an_optimiser_on_the_host_leaves_weights_and_what_passes_here() -> None:
    here, there = (memory_of(run_of(settings(engine, 2))) for engine in ("zero2", "zero2-offload"))
    for before, after in zip(here.parts, there.parts, strict=True):
        if before.held is None or after.held is None:
            assert before == after
            continue
        masters = before.held.average  # as large as float32 masters
        assert (after.held.optimizer, after.held.average) == (before.held.optimizer, before.held.average)
        assert after.held.weights == before.held.weights - masters
        assert after.resting == after.held.weights + after.held.buffers
        average = masters if after.averaged else 0
        assert after.host > masters + before.held.optimizer + average > 0
    assert here.host == 0 and there.host == sum(part.host for part in there.parts)
    # "all the time" and the dearest update, less what the host has
    assert there.resting < here.resting and there.peak < here.peak


def test_an_optimiser_on_the_host_is_offered() -> None:
    told = Planner().alternatives(run_of(settings("zero2", 2)))
    assert told["engine.offload_optimizer=true"].host > 0
    alone = run_of(settings("zero0", batch_size=1, micro_batches=1) | {"method": "flow_matching"})
    told = planned(alone, share=0.9)[0]
    assert told == ["engine={name: deepspeed, zero_stage: 1, precision: fp32, offload_optimizer: true}"]
    assert "engine.offload_optimizer=true" not in Planner().alternatives(run_of(settings("zero2-offload", 2)))
    whole = settings("torch", 2) | {"optimizer": {"name": "muon"}}  # which no shard can show what it needs
    assert not any("offload" in each for each in Planner().alternatives(run_of(whole)))


def test_more_passes_keep_gradients_beside_those_that_leave() -> None:
    engine = run_of(settings("zero2")).engine
    parameters = [nn.Parameter(torch.empty(1024, 4096, device="meta")) for _ in range(4)]  # two for each rank
    one, two = (engine.held(parameters, AdamW(), 2, passes) for passes in (1, 2))
    size = 4 * 4096**2
    assert one == replace(two, passing=one.passing, stepping=one.stepping) and two.passing - one.passing == size // 2
    # the bucket, and the bucket flat, beside what is kept of this pass and of those before
    assert one.stepping == 2 * size and two.stepping - one.stepping == size // 2 == one.gradients


def test_the_flat_copy_lies_beside_the_norm_of_an_offloaded_gradient() -> None:
    parameters = [nn.Parameter(torch.empty(1024, 4096, device="meta")) for _ in range(4)]
    for engine in ("zero1-offload", "zero2-offload"):
        held = run_of(settings(engine)).engine.held(parameters, AdamW(), 2, 1)
        assert held.stepping == 2 * 4 * 4096**2 + 8 * 1024 * 4096  # bucket and copy, and one gradient in float64


def test_a_bucket_that_leaves_amid_the_backward_is_made_flat_beside_activations() -> None:
    engine = run_of(settings("zero2-bf16")).engine
    small, large = ([nn.Parameter(torch.empty(size, device="meta"))] for size in (400_000_000, 600_000_000))
    assert engine.held(small, AdamW(), 2, 1).passing == 2 * 400_000_000
    assert engine.held(large, AdamW(), 2, 1).passing == 2 * 2 * 500_000_000
