"""The losses of pairs on several ranks: values, gradients, memory and refusals; and a run on two ranks, ZeRO included."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gentrain.methods.contrastive import Contrastive
from gentrain.methods.contrastive_loss import sigmoid_contrastive_loss, softmax_contrastive_loss
from gentrain.methods.prompt_critic import prompt_critic_loss
from gentrain.training.world import RankGroup, World
from tests.distributed.cases import Job, difference, record_difference, records, state_of, train_all, values
from tests.methods.captioned import CaptionedPatches
from tests.methods.test_contrastive import WIDTH, assert_near, inputs
from tests.models.readers import bert, vit
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

PAIRS = 12  # of all ranks; 1, 2, 3 and 4 divide it
EXCHANGES = ("two_way_ring", "ring", "gather")
LABELS = torch.randint(-1, 2, (PAIRS, PAIRS), generator=torch.Generator().manual_seed(2))
Case = tuple[str, int | None, bool, str]  # exchange, chunk size, whether there is a label matrix, which tower is locked


def cases(ranks: int) -> list[Case]:
    chunks = (None, *range(1, PAIRS // ranks + 1))
    plain: list[Case] = [(exchange, chunk, labelled, "") for exchange in EXCHANGES for chunk in chunks for labelled in (False, True)]
    return plain + [(exchange, 2, False, locked) for exchange in EXCHANGES for locked in ("image", "text")]


def part(value: Tensor, world: World) -> Tensor:
    return value.chunk(world.size)[world.rank]


def losses(world: World) -> dict[Any, list[Tensor]]:
    """Per case: this rank's loss and its gradients by image, text, t', b (0 for a locked tower's)."""
    group = RankGroup(world.size)
    found: dict[Any, list[Tensor]] = {}
    for case in cases(world.size):
        exchange, chunk, labelled, locked = case
        image, text, scale, bias = (value.detach() for value in inputs(PAIRS))
        of = [part(image, world).clone(), part(text, world).clone(), scale.clone(), bias.clone()]
        for name, value in zip(("image", "text", "", ""), of, strict=True):
            value.requires_grad_(name != locked or not locked)
        labels = part(LABELS, world) if labelled else None
        value = sigmoid_contrastive_loss(*of, labels=labels, group=group, chunk_size=chunk, exchange=exchange)  # type: ignore[arg-type]
        value.backward()
        found[case] = [value.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in of)]
    of = [part(value.detach(), world).clone().requires_grad_() if value.ndim == 2 else value for value in inputs(PAIRS)[:3]]
    value = softmax_contrastive_loss(of[0], of[1], of[2], group, chunk_size=2)
    found["softmax"] = [value.detach(), *torch.autograd.grad(value, of)]
    found["prompt critic"] = prompt_critic(world)
    return found


PLACES = torch.tensor([0, 1, 0, 2, 3, 4, 5, 1, 6, 7, 8, 9])  # of prompts: two of them twice


def prompt_critic(world: World) -> list[Tensor]:
    """Of pictures that are their own embeddings: the loss and its gradients by the real, the drawn ones, the prompts, t' and b."""
    image, text, scale, bias = (value.detach() for value in inputs(PAIRS))
    of = [part(value, world).clone().requires_grad_() for value in (image, image.flip(0) + 0.5, text)]
    of += [value.clone().requires_grad_() for value in (scale, bias)]

    def towers(x: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([x, tokens, torch.cat(of[3:]).expand(len(x), 2)], 1)

    value, _ = prompt_critic_loss(towers, *of[:3], part(PLACES, world), RankGroup(world.size))
    return [value.detach(), *torch.autograd.grad(value, of)]


def single(case: Any) -> list[Tensor]:
    of = inputs(PAIRS)
    if case == "prompt critic":
        return prompt_critic(World(0, 1, torch.device("cpu")))
    if case == "softmax":
        value = softmax_contrastive_loss(of[0], of[1], of[2])
        return [value.detach(), *torch.autograd.grad(value, of[:3])]
    value = sigmoid_contrastive_loss(*of, labels=LABELS if case[2] else None)
    result = [value.detach(), *torch.autograd.grad(value, of)]
    if case[3]:
        locked = 1 + ("image", "text").index(case[3])
        result[locked] = torch.zeros_like(result[locked])
    return result


def everything(world: World) -> dict[str, Any]:
    parts: list[Callable[[World], Any]] = [losses, memory, traffic, refusals]
    if world.size == 3:
        parts.append(in_a_part_of_the_ranks)
    return {part.__name__: part(world) for part in parts}


@cache
def on(ranks: int) -> list[dict[str, Any]]:
    """What each rank found. Processes are started once for each number of ranks; one rank needs none."""
    return run_ranks(ranks, everything) if ranks > 1 else [everything(World(0, 1, torch.device("cpu")))]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_data_parallel_averages_are_the_loss_and_gradients_of_one_process(ranks: int) -> None:
    """Each rank's gradient by its embeddings is `ranks` times the whole loss's: divided by the ranks in the average of gradients."""
    results = [result["losses"] for result in on(ranks)]
    for case in results[0]:
        expected = single(case)
        each = [result[case] for result in results]
        averaged = [torch.stack([values[k] for values in each]).mean(0) for k in range(len(expected))]
        rows = (1, 2, 3) if case == "prompt critic" else (1, 2)
        averaged[1 : 1 + len(rows)] = [torch.cat([values[k] for values in each]) / ranks for k in rows]
        for found, right in zip(averaged, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}")


def test_each_rank_has_the_loss_of_its_own_images() -> None:
    image, text, scale, bias = (value.detach() for value in inputs(PAIRS))
    for rank, result in enumerate(on(2)):
        rows = slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
        cosine = torch.nn.functional.normalize(image[rows]) @ torch.nn.functional.normalize(text).T
        sign = -torch.ones_like(cosine)
        sign.diagonal(rows.start).fill_(1)
        right = -torch.nn.functional.logsigmoid(sign * (scale.exp() * cosine + bias)).sum() / (PAIRS // 2)
        for exchange in EXCHANGES:
            torch.testing.assert_close(result["losses"][exchange, None, False, ""][0], right)


class Recording(RankGroup):
    """Notes how many elements each message round the ring has."""

    def __init__(self, size: int):
        super().__init__(size)
        self.sent: list[int] = []

    def shift(self, value: Tensor, steps: int) -> Callable[[], Tensor]:
        self.sent.append(value.numel())
        return super().shift(value, steps)


def memory(world: World) -> dict[str, tuple[int, list[int]]]:
    """Per exchange: bytes kept for backward, and the messages."""
    found = {}
    for exchange in EXCHANGES:
        sizes: list[int] = []
        group = Recording(world.size)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved, sizes=sizes: sizes.append(saved.nbytes) or saved, lambda saved: saved):
            sigmoid_contrastive_loss(*inputs(64), group=group, chunk_size=8, exchange=exchange)  # type: ignore[arg-type]
        found[exchange] = (sum(sizes), group.sent)
    return found


def test_memory_does_not_grow_with_the_ranks() -> None:
    """What is kept is the embeddings, their lengths and their gradients; W - 1 blocks travel, each with its gradient one visit behind."""
    block = 64 * WIDTH
    alone, four = on(1)[0]["memory"], on(4)[0]["memory"]
    for exchange in EXCHANGES:
        assert four[exchange][0] == alone[exchange][0] < 10 * 8 * block
        assert alone[exchange][1] == []
    assert four["ring"][1] == [block, block, 2 * block, block, block]
    assert sorted(four["two_way_ring"][1]) == [block] * 6
    assert four["gather"][1] == []


def traffic(world: World) -> dict[Any, tuple[list[int], list[Tensor]]]:
    """By locked tower and what repeated captions are: messages of one ring; loss and gradients by image, text (0 if locked), scalars."""
    found = {}
    for locked, repeats in product(("", "image", "text"), ("match", "negative")):
        group, (image, text, scale, bias) = Recording(world.size), [value.detach() for value in inputs(PAIRS)]
        scalars = torch.cat([scale, bias]).requires_grad_()
        batch = {"x": part(image, world).clone(), "tokens": part(text, world).clone(), "caption": part(PLACES, world)}
        for value, name in ((batch["x"], "image"), (batch["tokens"], "text")):
            value.requires_grad_(name != locked)
        sides = [batch["x"], batch["tokens"]]
        if locked:
            batch[f"locked/{locked}"] = torch.zeros(len(batch["x"]), 0)

        def towers(x: Tensor, tokens: Tensor, scalars: Tensor = scalars) -> Tensor:
            return torch.cat([x, tokens, scalars.expand(len(x), 2)], 1)

        nets = SimpleNamespace(towers=towers, group=group)
        method = Contrastive(shift=0, exchange="ring", repeats=repeats)  # type: ignore[arg-type]
        value = method.pair_loss(nets, batch, None).value  # type: ignore[arg-type]
        value.backward()
        found[locked, repeats] = (
            group.sent,
            [value.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in (*sides, scalars))],
        )
    return found


@pytest.mark.parametrize("repeats", ["match", "negative"])
def test_a_gradient_travels_only_where_one_is_wanted(repeats: str) -> None:
    """A locked tower's embeddings go round, whichever it is, and nothing comes home; all else is what it is without a lock."""
    block = PAIRS // 4 * WIDTH
    ranks = [result["traffic"] for result in on(4)]
    for locked, place in (("", None), ("image", 1), ("text", 2)):
        for rank in ranks:
            messages, found = rank[locked, repeats]
            assert messages == ([block] * 3 if locked else [block, block, 2 * block, block, block])
            assert place is None or found[place].abs().max() == 0
        free, found = ([rank[name, repeats][1] for rank in ranks] for name in ("", locked))
        for k in {0, 1, 2, 3} - {place}:  # loss and scalars are means over the ranks, embeddings belong to one
            a, b = (torch.stack([values[k] for values in each]) for each in (found, free))
            assert_near([a] if k in (1, 2) else [a.mean(0)], [b] if k in (1, 2) else [b.mean(0)])


def refusals(world: World) -> list[str]:
    group, found = RankGroup(world.size), []
    image, text, scale, bias = (value.detach() for value in inputs(PAIRS))
    ragged = PAIRS // 2 - world.rank
    attempts: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (image[:ragged], text[:ragged], None),
        (image[:4], text[: 4 - world.rank], None),  # wrong on one rank only
        (image[:4], text[:4], torch.zeros(4, 4 * world.size - world.rank)),
    ]
    for rows, columns, labels in attempts:
        try:
            sigmoid_contrastive_loss(rows, columns, scale, bias, labels, group)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_unequal_batches_are_refused_on_all_ranks_before_they_hang() -> None:
    first, second = (result["refusals"] for result in on(2))
    assert first[0] == second[0] and "[6, 5], [5, 5]" in first[0]
    assert first[1].startswith("another rank") and "must both be" in second[1]
    assert first[2].startswith("another rank") and "labels must be" in second[2]


def in_a_part_of_the_ranks(world: World) -> list[Tensor]:
    """Two groups, {0, 2} and {1}: ranks of the group are not those of the world."""
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    mine = alone if world.rank == 1 else pair
    group = RankGroup(dist.get_world_size(mine), mine)
    of = [value.detach().chunk(group.size)[group.rank] if value.ndim == 2 else value.detach() for value in inputs(PAIRS)]
    return [sigmoid_contrastive_loss(*of, group=group, exchange=exchange) for exchange in EXCHANGES]  # type: ignore[arg-type]


def test_any_process_group_will_do() -> None:
    first, middle, last = (result["in_a_part_of_the_ranks"] for result in on(3))
    whole = single(("ring", None, False, ""))[0]
    for k in range(len(EXCHANGES)):
        torch.testing.assert_close((first[k] + last[k]) / 2, whole)
        torch.testing.assert_close(middle[k], whole)


PATCHES: dict[str, Any] = {
    "data": {"name": CaptionedPatches.registered_name},
    "model": {"name": "towers", "width": 8, "channels": [8], "norm_groups": 2, "buckets": 64, "initial_bias": -2.5},
    "method": {"name": "contrastive", "shift": 1},
}


def run_settings(root: Path, name: str, engine: Any, **method: Any) -> dict[str, Any]:
    changed = {**PATCHES, "method": {**PATCHES["method"], **method}}
    return values(root / name, engine=engine, micro_batches=1) | changed


def train_towers(world: World, jobs: list[Job]) -> list[tuple[str, str]]:
    """`train_all` of this module, so that spawned ranks import the data set."""
    return train_all(world, jobs)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    zero = {"name": "deepspeed", "zero_stage": 2}
    with_pieces = run_settings(root, "pieces", zero)
    with_pieces["model"] = {**with_pieces["model"], "rows_at_once": 4}
    jobs = [
        Job(run_settings(root, "torch", "torch", exchange="ring")),
        Job(run_settings(root, "zero", zero)),
        Job(run_settings(root, "halves", zero), stop_at=3),
        Job(run_settings(root, "halves", zero)),
        Job(with_pieces),
        Job(run_settings(root, "softmax", zero, loss="softmax")),
    ]
    locked = {"text": {"text": str(bert(root / "bert"))}, "image": {"image": str(vit(root / "vit"))}}
    alone = [Job(run_settings(root, "alone", "torch")), Job(run_settings(root, "softmax-alone", "torch", loss="softmax"))]
    for side, weights in locked.items():
        model = {"name": "towers", "channels": [8], "norm_groups": 2, "buckets": 64, "initial_bias": -2.5, "lock": side, **weights}
        alone.append(Job(run_settings(root, f"locked-{side}-alone", "torch") | {"model": model}))
        for name, engine in {"torch": "torch", "2": zero, "3": {**zero, "zero_stage": 3}}.items():
            jobs.append(Job(run_settings(root, f"locked-{side}-{name}", engine) | {"model": model}))
    assert run_ranks(2, train_towers, jobs) == [[("finished", "") if job.stop_at is None else ("stopped", "") for job in jobs]] * 2
    assert train_all(World(0, 1, torch.device("cpu")), alone) == [("finished", "")] * len(alone)
    return root


@pytest.mark.parametrize(
    "one, other",
    [
        *[("alone", other) for other in ("torch", "zero", "pieces")],
        ("softmax-alone", "softmax"),
        *[(f"locked-{side}-alone", f"locked-{side}-{engine}") for side in ("text", "image") for engine in ("torch", "2", "3")],
    ],
)
def test_two_ranks_train_the_towers_of_one(root: Path, one: str, other: str) -> None:
    """top1 is logged among the rank's own texts, so that it alone differs."""
    curves = [[{k: v for k, v in line.items() if k != "top1"} for line in records(root / name)] for name in (one, other)]
    assert len(curves[0]) == 6
    assert record_difference(*curves) <= 1e-5
    assert difference(state_of(root / one), state_of(root / other)) <= 1e-4


def test_a_resumed_run_is_the_uninterrupted_one(root: Path) -> None:
    assert records(root / "zero") == records(root / "halves")
    assert difference(state_of(root / "zero"), state_of(root / "halves")) == 0
