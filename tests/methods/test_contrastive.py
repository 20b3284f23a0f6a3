"""Pairwise sigmoid and softmax losses on one process, against formulas written out again in float64; towers; the method on a toy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, Document
from gentrain.methods.contrastive import Contrastive, same_caption, sigmoid_contrastive_loss, softmax_contrastive_loss
from gentrain.metrics.retrieval import recall
from gentrain.models.towers import pieces, unpack
from gentrain.noise import Noise
from gentrain.recipes.evaluate import read_metrics
from gentrain.recipes.retrieval import Retrieval, embed_held_out, retrieval
from gentrain.training.loop import Outcome, train
from gentrain.training.optimizers import AdamW
from gentrain.training.roles import build_network
from gentrain.training.run import RunConfig, parse_run, save_config
from gentrain.training.world import RankGroup, World
from tests.methods.captioned import CaptionedPatches

PAIRS, WIDTH = 7, 5


def inputs(pairs: int = PAIRS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Image, text, t', b; embeddings of any length."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(pairs, WIDTH, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    scalars = (torch.tensor([value], dtype=torch.float64) for value in (math.log(10), -1.5))
    return [value.to(dtype).requires_grad_() for value in (image, text, *scalars)]


def written_out(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None = None) -> Tensor:
    """-(1 / N) sum_i sum_j log sigmoid(y_ij (e^t' cos_ij + b)), one pair after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(image)):
        for j in range(len(text)):
            cosine = (image[i] * text[j]).sum() / (image[i].square().sum().sqrt() * text[j].square().sum().sqrt())
            y = (1 if i == j else -1) if labels is None else int(labels[i, j])
            if y:
                total = total - torch.log(1 / (1 + torch.exp(-y * (torch.exp(scale[0]) * cosine + bias[0]))))
    return total / len(image)


def gradients(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, of)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


LABELS = torch.randint(-1, 2, (PAIRS, PAIRS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("labels", [None, LABELS], ids=["pairs", "matrix"])
@pytest.mark.parametrize("chunk_size", [None, *range(1, PAIRS + 2)])
def test_loss_and_all_gradients_are_those_of_the_formula(chunk_size: int | None, labels: Tensor | None) -> None:
    of = inputs()
    found = gradients(sigmoid_contrastive_loss(*of, labels=labels, chunk_size=chunk_size), of)
    assert_near(found, gradients(written_out(*of, labels), of))


def test_gradients_agree_with_differences() -> None:
    assert torch.autograd.gradcheck(lambda *of: sigmoid_contrastive_loss(*of, chunk_size=3), inputs())
    assert torch.autograd.gradcheck(lambda *of: softmax_contrastive_loss(*of, chunk_size=3), inputs()[:3])


def test_the_upstream_gradient_multiplies() -> None:
    of = inputs()
    once = torch.autograd.grad(sigmoid_contrastive_loss(*of), of)
    thrice = torch.autograd.grad(3 * sigmoid_contrastive_loss(*of), of)
    assert_near(list(thrice), [3 * value for value in once])


def test_the_bias_counts_with_its_sign() -> None:
    """At s = 0 a loss of N pairs is softplus(-b) + (N - 1) softplus(b): with b = -10 about 10, with b = +10 about 10 (N - 1)."""
    image, text = torch.eye(2 * PAIRS, dtype=torch.float64).chunk(2)  # orthogonal
    value = sigmoid_contrastive_loss(image, text, torch.tensor(2.3), torch.tensor(-10.0)).item()
    assert value == pytest.approx(math.log1p(math.exp(10)) + (PAIRS - 1) * math.log1p(math.exp(-10)), rel=1e-9)


def test_large_logits_keep_their_tail() -> None:
    """torch's softplus(x) is x from x = 20 on, which is wrong by 8e-10 at 21."""
    one, scale = torch.ones(1, 4, dtype=torch.float64), torch.tensor(math.log(21), dtype=torch.float64)
    value = sigmoid_contrastive_loss(one, one, scale, torch.zeros((), dtype=torch.float64), -torch.ones(1, 1))
    assert value.item() - 21 == pytest.approx(math.log1p(math.exp(-21)), rel=1e-4)


def test_the_temperature_is_clamped_in_the_forward_pass() -> None:
    image, text, _, bias = inputs()
    clamped, over = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (math.log(100), 7.0))
    below = torch.tensor([4.6], dtype=torch.float64, requires_grad=True)
    for loss in (lambda t: sigmoid_contrastive_loss(image, text, t, bias), lambda t: softmax_contrastive_loss(image, text, t)):
        torch.testing.assert_close(loss(over), loss(clamped))
        assert torch.autograd.grad(loss(over), over)[0] == 0 != torch.autograd.grad(loss(below), below)[0]
    assert over.item() == 7.0  # the parameter itself stays


@pytest.mark.parametrize("labels", [None, LABELS], ids=["pairs", "matrix"])
@pytest.mark.parametrize("learns", [(True, False), (False, True)], ids=["locked text", "locked image"])
def test_a_locked_tower_changes_nothing_for_the_other(learns: tuple[bool, bool], labels: Tensor | None) -> None:
    of = inputs()
    expected = gradients(sigmoid_contrastive_loss(*of, labels), of)
    locked = [value.detach() if number < 2 and not learns[number] else value for number, value in enumerate(of)]
    kept = [number for number, value in enumerate(locked) if value.requires_grad]
    found = gradients(sigmoid_contrastive_loss(*locked, labels, chunk_size=2), [locked[number] for number in kept])
    assert_near(found, [expected[0], *(expected[1 + number] for number in kept)])


def test_without_gradients_the_value_is_the_same() -> None:
    of = inputs()
    with torch.no_grad():
        value = sigmoid_contrastive_loss(*of)
    assert not value.requires_grad
    assert value == sigmoid_contrastive_loss(*of)


def test_softmax_is_the_mean_of_two_cross_entropies() -> None:
    of = inputs()[:3]
    image, text, scale = of
    cosine = torch.stack([torch.stack([torch.cosine_similarity(i, t, dim=0) for t in text]) for i in image]) * scale.exp()
    rows = sum(-torch.log(cosine[i].exp()[i] / cosine[i].exp().sum()) for i in range(PAIRS))
    columns = sum(-torch.log(cosine[:, i].exp()[i] / cosine[:, i].exp().sum()) for i in range(PAIRS))
    expected = gradients((rows + columns) / (2 * PAIRS), of)
    for chunk_size in (None, 1, 3):
        assert_near(gradients(softmax_contrastive_loss(*of, chunk_size=chunk_size), of), expected)


def test_half_precision_and_autocast_have_float32_logits() -> None:
    """Near b = -10 bfloat16 has steps of 1/16, which would be a relative error of a negative pair's loss of up to 3 %."""
    image, text, scale, _ = (value.detach() for value in inputs(64, torch.bfloat16))
    bias = torch.tensor([-10.0])
    exact = sigmoid_contrastive_loss(image.double(), text.double(), scale.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sigmoid_contrastive_loss(image, text, scale, bias)
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() / exact.item() - 1) < 1e-5


def test_what_is_kept_for_backward_grows_with_the_batch_not_its_square() -> None:
    def kept(pairs: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.nbytes) or saved, lambda saved: saved):
            sigmoid_contrastive_loss(*inputs(pairs))
        return sum(sizes)

    assert kept(512) < 2.05 * kept(256)


def test_extreme_embeddings_stay_finite() -> None:
    of = [torch.zeros(3, 4, requires_grad=True), torch.full((3, 4), 1e4, requires_grad=True), torch.tensor([4.6]), torch.tensor([-100.0])]
    values = gradients(sigmoid_contrastive_loss(*of), of[:2])
    assert all(torch.isfinite(value).all() for value in values)
    assert values[0] == pytest.approx(100.0, rel=1e-6)  # the matching pairs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": torch.zeros(3, WIDTH)}, "must both be"),
        ({"image": torch.zeros(0, WIDTH), "text": torch.zeros(0, WIDTH)}, "B > 0"),
        ({"labels": torch.zeros(PAIRS, PAIRS + 1)}, rf"labels must be \[{PAIRS}, {PAIRS}\]"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    image, text, scale, bias = inputs()
    given = {"image": image, "text": text, "logit_scale": scale, "logit_bias": bias, **changes}
    with pytest.raises(ValueError, match=message):
        sigmoid_contrastive_loss(**given)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "method": {"name": "contrastive", "shift": 0},
        "data": CaptionedPatches.registered_name,
        "model": {"name": "towers", "width": 16, "channels": [8], "buckets": 256, "initial_bias": -3.3},
        "optimizer": {"name": "adamw", "lr": 0.01, "beta2": 0.95, "weight_decay": 0.1},
        "engine": "torch",
        "training": {"samples": 640, "batch_size": 32, "log_every": 32},
        "output": "runs/unused",
        **changes,
    }


def parsed(**changes: Any) -> RunConfig:
    return parse_run(Document(settings(**changes), "test"))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_twenty_steps_find_the_pairs(tmp_path: Path, loss: str) -> None:
    run = parsed(method={"name": "contrastive", "shift": 0, "loss": loss, "examined": 100}, output=str(tmp_path / loss))
    save_config(run)
    assert train(run, World(0, 1, torch.device("cpu")), lambda: False) is Outcome.FINISHED
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    # over seeds 0, 1, 2: top1 from 0.03 to 0.41 at least, the loss falls to 0.39 at most of what it was, recall @1 is 0.88 at least
    assert lines[0]["top1"] < 0.1 and lines[-1]["top1"] > 0.25
    assert lines[-1]["loss/towers"] < 0.6 * lines[0]["loss/towers"]
    assert (lines[-1]["logit_bias"] != lines[0]["logit_bias"]) == (loss == "sigmoid")
    assert lines[-1]["logit_scale"] != lines[0]["logit_scale"]
    found = retrieval(*embed_held_out(str(run.directory)))
    assert [metric.value > 0.6 for metric in found[:2]] == [True] * 2, found  # captions that were never seen; chance is 1 / 8
    assert all("zero-shot class" in metric.name for metric in found[4:])
    Retrieval(str(run.directory)).execute(tmp_path / "found")
    assert {each["name"]: each["value"] for each in read_metrics(tmp_path / "found")} == {metric.name: metric.value for metric in found}
    assert {metric.name: lines[-1][f"held_out/{metric.name}"] for metric in found} == {metric.name: metric.value for metric in found}
    assert lines[0]["held_out/text to image @1"] < lines[-1]["held_out/text to image @1"]


def test_a_caption_that_repeats_is_a_match() -> None:
    caption, group = torch.tensor([4, 2, 4]), RankGroup(1)
    assert same_caption(caption, group).tolist() == [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert same_caption(caption, group).dtype == torch.int8


def test_the_text_of_another_pair_with_the_same_caption_is_a_hit() -> None:
    """Of three images the first has the third's text nearest, the second its own, the third the second's."""
    image, text = torch.eye(3)[[2, 1, 1]], torch.eye(3)
    batch = {"x": image, "tokens": text, "caption": torch.tensor([4, 2, 4])}
    nets = SimpleNamespace(towers=lambda x, tokens: torch.cat([x, tokens, torch.zeros(3, 2)], 1), group=RankGroup(1))
    logs = Contrastive(shift=0).pair_loss(nets, batch, Noise(0, torch.arange(3))).logs  # type: ignore[arg-type]
    assert logs["top1"].item() == pytest.approx(2 / 3)


def built(**changes: Any) -> torch.nn.Module:
    run = parsed(**changes)
    run.codec()
    return build_network(run, "towers")


def towers_and_batch(rows_at_once: int = 0) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    run = parsed(model={"name": "towers", "width": 8, "channels": [8], "rows_at_once": rows_at_once})
    batch = run.data.split("train").batch(torch.arange(24))  # type: ignore[attr-defined]
    return build_network(run, "towers"), run.codec().encode(batch, Noise(0, torch.arange(24)))


def test_towers_start_at_the_temperature_and_bias_of_the_paper() -> None:
    towers, batch = towers_and_batch()
    embeddings = unpack(towers(batch["x"], batch["tokens"]))
    assert embeddings.image.shape == embeddings.text.shape == (24, 8)
    assert embeddings.logit_scale.item() == pytest.approx(math.log(10)) and embeddings.logit_bias.item() == -10.0
    torch.testing.assert_close(embeddings.image, towers.image(batch["x"]))
    torch.testing.assert_close(embeddings.text, towers.text(batch["tokens"]))


def test_pairs_in_pieces_are_the_batch_at_once_with_less_held() -> None:
    """Gradients through pieces are those of the whole batch's negatives, not of each piece's own."""
    results, held = [], []
    for rows_at_once in (0, 5):
        towers, batch = towers_and_batch(rows_at_once)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved, sizes=sizes: sizes.append(saved.nbytes) or saved, lambda saved: saved):
            output = towers(batch["x"], batch["tokens"])
        value = sigmoid_contrastive_loss(*unpack(output))
        results.append(gradients(value, list(towers.parameters())))
        held.append(sum(sizes))
    assert_near(results[1], results[0], 1e-5)
    assert held[1] < held[0] / 3


def test_only_matrices_decay() -> None:
    towers, _ = towers_and_batch()
    names = {id(p): name for name, p in towers.named_parameters()}
    first, second = AdamW(weight_decay=0.1).build(towers.parameters()).param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(p)] for p in second["params"]}
    assert {"logit_scale", "logit_bias", "text.layers.0.bias", "image.convolutions.1.weight"} <= kept
    assert "text.layers.0.weight" in {names[id(p)] for p in first["params"]}
    assert len(first["params"]) + len(second["params"]) == len(names)
    assert len(AdamW(weight_decay=0.1).build([torch.nn.Parameter(torch.ones(2))]).param_groups) == 1  # as before where nothing is marked


def test_words_share_groups_of_letters() -> None:
    assert set(pieces("cats", 2**20)) & set(pieces("cat", 2**20)) and not set(pieces("dog", 2**20)) & set(pieces("cat", 2**20))
    assert pieces("Cat", 100) == pieces("cat", 100) and min(pieces("a cat", 100)) >= 1
    assert len(pieces("cat", 10)) == 1 + 3 + 2 + 1  # <cat>; <ca cat at>; <cat cat>; <cat>


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "rings"}, "images with captions"),
        ({"model": {"name": "towers", "channels": [12]}}, "not divisible by norm_groups"),
        ({"model": {"name": "towers", "channels": [8, 8, 8]}}, "do not fit 3 levels"),
        ({"data": {"name": "mnist5k"}}, "need data with captions"),
        ({"method": {"name": "contrastive", "examined": 4}}, "0 or at least 5"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**changes)


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: towers"):
        Contrastive().pair_loss(SimpleNamespace(), {"x": torch.zeros(2, 3, 8, 8)}, Noise(0, torch.arange(2)))


def test_recall_counts_ties_against_itself() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.4, 0.2], [0.1, 0.3, 0.2]])
    assert recall(similarity, torch.arange(3), 1, "x").value == pytest.approx(1 / 3)
    assert recall(similarity, torch.arange(3), 2, "x").value == 1
    assert "chance 33.33%" in recall(similarity, torch.arange(3), 1, "x").definition
    with pytest.raises(ValueError, match="from 1 to the number of candidates 3"):
        recall(similarity, torch.arange(3), 4, "x")
