"""DDO of autoregressive models on laws that can be enumerated (specification, D1 to D6 and D8), and what the method makes of networks."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document
from gentrain.data.tokens import Walks
from gentrain.methods.base import Clock
from gentrain.methods.ddo import DDO, ddo_loss
from gentrain.methods.maximum_likelihood import MaximumLikelihood
from gentrain.methods.token_ddo import TokenDDO
from gentrain.models.base import Condition
from gentrain.models.tokens import Cache, TokenModel
from gentrain.noise import Noise
from gentrain.samplers.autoregressive import Autoregressive
from gentrain.samplers.heun import Heun
from gentrain.training.run import parse_run
from tests.models.test_tokens import network_of

LN2 = math.log(2)
V, ROWS = 4, 400
PAIRS = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # every sequence of two tokens


class Table(nn.Module):
    """An autoregressive law of two tokens that may be any: logits of the first [V] and of the second given the first [V, V]."""

    def __init__(self, law: Tensor):
        super().__init__()
        law = law.reshape(V, V)
        self.first, self.second = nn.Parameter(law.sum(1).log()), nn.Parameter((law / law.sum(1, keepdim=True)).log())

    def forward(self, tokens: Tensor, condition: Condition | None = None, cache: Cache | None = None) -> Tensor:
        return torch.stack([self.first.expand(len(tokens), V), self.second[tokens[:, 0]]], 1)


def laws() -> tuple[Tensor, Tensor, Tensor]:
    """Data as places in PAIRS [ROWS], their law and the reference's, float64."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 45, (V * V,), generator=generator)
    counts[0] += ROWS - counts.sum()
    assert counts.min() > 0
    reference = torch.randn(V * V, generator=generator, dtype=torch.float64).softmax(0)
    return torch.arange(V * V).repeat_interleave(counts), counts.double() / ROWS, reference


def loss_of(model: Table, alpha: float, beta: float) -> Tensor:
    """Over all of the data; the reference's samples count by their probabilities."""
    rows, _, law = laws()
    nets = SimpleNamespace(model=TokenModel(model), reference=TokenModel(Table(law)))
    ratio = TokenDDO(pool="", beta=1.0).ratio(nets, {"x": PAIRS}, Noise(0, torch.arange(V * V)))
    return ddo_loss(ratio.log_ratio[rows], ratio.log_ratio, alpha, beta, V * V * law)


def optimum(alpha: float, beta: float) -> Tensor:
    model = Table(laws()[2])
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, alpha, beta)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return TokenModel(model).log_prob(PAIRS).detach().exp()


def variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def test_the_optimum_is_the_law_of_the_data() -> None:
    _, data, reference = laws()
    assert variation(reference, data) > 0.2
    assert variation(optimum(1, 1), data) < 1e-6


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_the_optimum_of_another_beta_is_the_tilted_law_at_alpha_z_to_the_beta(beta: float) -> None:
    _, data, reference = laws()
    tilted = reference ** (1 - 1 / beta) * data ** (1 / beta)
    z = float(tilted.sum())
    assert variation(optimum(z**beta, beta), tilted / z) < 1e-6
    if beta == 0.5:  # the control: the formula is not that of alpha = 1
        assert variation(optimum(1, beta), tilted / z) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
def test_the_first_gradient_is_half_beta_that_of_the_likelihood(alpha: float) -> None:
    rows, _, law = laws()
    model, beta = Table(law), 0.7
    loss_of(model, alpha, beta).backward()
    likely = Table(law)
    (-(beta / 2) * (TokenModel(likely).log_prob(PAIRS[rows]).mean() - (law * TokenModel(likely).log_prob(PAIRS)).sum())).backward()
    for one, other in zip(model.parameters(), likely.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-12 < one.grad.abs().max()  # type: ignore[operator, union-attr]


# --- the method -------------------------------------------------------------------------------------------------------------


def walks(count: int, start: int = 0) -> dict[str, Tensor]:
    return {
        key: value % 3 if key == "x" else value
        for key, value in Walks(length=4).split("train").batch(torch.arange(start, start + count)).items()
    }


def with_fakes(count: int) -> dict[str, Tensor]:
    fakes = walks(count, 1000)
    return walks(count) | {"fake/x": fakes["x"], "fake/label": fakes["label"]}


def nets(same: bool = False) -> SimpleNamespace:
    reference: Any = network_of("next token")
    model = copy.deepcopy(reference)
    if not same:
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(reference=Seen(reference), model=Seen(model))


class Seen(TokenModel):
    """Remembers the labels that it met."""

    def __init__(self, network: Any):
        self.labels: list[Tensor] = []

        def call(tokens: Tensor, condition: Any = None, **more: Any) -> Tensor:
            self.labels.append(condition["label"])
            return network(tokens, condition, **more)  # type: ignore[no-any-return]

        super().__init__(call)
        self.module = network


def noise_of(count: int) -> Noise:
    return Noise(1, torch.arange(count))


def method(**settings: Any) -> TokenDDO:
    return TokenDDO(**{"pool": "elsewhere", "beta": 0.5, "alpha": 2.0, **settings})


def test_a_model_that_is_its_reference_has_the_loss_of_a_coin() -> None:
    found = method(label_dropout=0.0).loss(nets(same=True), with_fakes(64), noise_of(64))
    assert found.value.item() == pytest.approx(3 * LN2, abs=1e-6)
    assert (found.logs["log_ratio_square"], found.logs["discriminator_accuracy"]) == (0, 0.5)
    assert found.logs["model_loss"] == found.logs["reference_loss"]


def test_the_loss_is_that_of_the_two_log_likelihoods() -> None:
    group, batch = nets(), with_fakes(64)
    found = method(label_dropout=0.0).loss(group, batch, noise_of(64))
    ratios = [
        group.model.log_prob(batch[f"{part}x"], {"label": batch[f"{part}label"]})
        - group.reference.log_prob(batch[f"{part}x"], {"label": batch[f"{part}label"]})
        for part in ("", "fake/")
    ]
    expected = -(0.5 * ratios[0]).sigmoid().log().mean() - 2 * (1 - (0.5 * ratios[1]).sigmoid()).log().mean()
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-9) and abs(expected.item() - 3 * LN2) > 1e-3
    nats = -group.model.log_prob(batch["x"], {"label": batch["label"]}).mean().item() / 4
    assert found.logs["model_loss"].item() == pytest.approx(nats)
    assert not any(value.requires_grad for value in found.logs.values())


def test_both_networks_meet_the_same_labels_and_only_one_learns() -> None:
    group = nets()
    method(label_dropout=0.5).loss(group, with_fakes(64), noise_of(64)).value.backward()
    for a, b in zip(group.reference.labels, group.model.labels, strict=True):
        assert torch.equal(a, b) and 0 < (a < 0).sum() < 64
    assert not torch.equal(group.model.labels[0] < 0, group.model.labels[1] < 0)  # of data and samples: draws of their own
    assert all(parameter.grad is None for parameter in group.reference.module.parameters())
    assert all(parameter.grad is not None for parameter in group.model.module.parameters())


def test_rows_without_label_are_not_pushed_away() -> None:
    losses = [method(alpha=alpha, label_dropout=1.0).loss(nets(), with_fakes(64), noise_of(64)).value.item() for alpha in (0.0, 50.0)]
    assert losses[0] == losses[1]
    half = method(label_dropout=0.5).loss(nets(same=True), with_fakes(2000), noise_of(2000))
    assert half.value.item() == pytest.approx(2 * LN2, rel=0.03)  # they keep their place in the mean


def test_data_without_labels_count_whole() -> None:
    batch = {key: value for key, value in with_fakes(64).items() if "label" not in key}
    group = SimpleNamespace(reference=TokenModel(network_of("next token")), model=TokenModel(network_of("next token")))
    assert method(label_dropout=0.5).loss(group, batch, noise_of(64)).value.item() == pytest.approx(3 * LN2, abs=1e-6)


def test_fakes_are_drawn_by_the_reference_with_the_labels_of_the_batch() -> None:
    group, batch = nets(), walks(16)
    on_the_fly = TokenDDO(beta=0.5, alpha=2.0, label_dropout=0.0)
    found = on_the_fly.loss(group, batch, noise_of(16))
    assert (len(group.reference.labels), len(group.model.labels)) == (4 + 2, 2)
    found.value.backward()
    assert all(parameter.grad is None for parameter in group.reference.module.parameters())
    noise = noise_of(16)
    with torch.no_grad():
        x = Autoregressive().sample(group.reference, (16, 4), noise, {"label": batch["label"]})
    pooled = method(label_dropout=0.0).loss(group, batch | {"fake/x": x, "fake/label": batch["label"]}, noise)
    assert found.value.item() == pooled.value.item()


def test_extreme_ratios_are_finite() -> None:
    group = nets()
    group.model = TokenModel(lambda tokens, condition: 5e3 * group.reference.module(tokens, condition).float())
    found = method(beta=1.0).loss(group, with_fakes(64), noise_of(64))
    assert found.value.isfinite() and found.logs["log_ratio_square"] > 1e6


def test_the_guard_speaks_above_twice_the_loss_of_the_reference() -> None:
    """D8: alpha 30 with a beta that leaves sigmoid at 1/2 pushes fakes away without bound, and the data with them."""
    group = nets(same=True)
    for parameter in group.model.module.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(group.model.module.parameters(), lr=0.02)
    careless, said = method(alpha=30.0, beta=0.01, label_dropout=0.0), None
    for step in range(200):
        batch = walks(64, 64 * step)
        found = careless.loss(group, batch | {"fake/x": batch["x"].roll(1, 0), "fake/label": batch["label"]}, noise_of(64))
        optimizer.zero_grad()
        found.value.backward()
        optimizer.step()
        said = careless.diverged({key: value.item() for key, value in found.logs.items()})
        if said:
            break
    assert said is not None and "raise method.beta" in said and step > 0


def test_samples_by_another_law_are_refused_on_the_fly() -> None:
    for settings, key in (({"guidance": 2}, "guidance"), ({"top_k": 3}, "top_k"), ({"temperature": 0.5}, "temperature")):
        with pytest.raises(ConfigError, match="are no samples of the reference") as caught:
            TokenDDO(sampler=Autoregressive(**settings))
        assert caught.value.key == f"sampler.{key}"


@pytest.mark.parametrize("method, wrong, fits", [(TokenDDO, Heun(), "autoregressive$"), (DDO, Autoregressive(), ".*euler.*heun")])
def test_samplers_of_something_else_are_refused(method: Any, wrong: Any, fits: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong.registered_name} does not draw what the reference knows; these do: {fits}") as caught:
        method(sampler=wrong)
    assert caught.value.key == "sampler"


def test_the_log_ratio_keeps_what_the_sums_over_tokens_would_lose() -> None:
    """1,000 tokens of log 7 each: their float32 sums have steps of 1e-4."""
    tokens, logits = torch.zeros(1, 1000, dtype=torch.int64), torch.zeros(1, 1000, 7)
    changed = logits.clone()
    changed[0, ::10, 0] = 1e-6
    group = SimpleNamespace(model=TokenModel(lambda x, condition: changed), reference=TokenModel(lambda x, condition: logits))
    exact = (changed.double().log_softmax(2) - logits.double().log_softmax(2))[0, :, 0].sum().item()
    found = method(label_dropout=0.0).ratio(group, {"x": tokens}, noise_of(1))
    assert found.log_ratio.item() == pytest.approx(exact, rel=0.2) and exact > 8e-5
    assert found.loss.item() == pytest.approx(math.log(7)) == found.reference_loss.item()


def test_maximum_likelihood_is_the_mean_per_token_and_drops_labels() -> None:
    group, batch = nets(), walks(2000)
    (update,) = MaximumLikelihood(label_dropout=0.3).updates(Clock(0, 64, 64))
    assert update.role == MaximumLikelihood.generator == "model"  # type: ignore[union-attr]
    found = update.losses[0](group, batch, noise_of(2000))  # type: ignore[union-attr]
    (label,) = group.model.labels
    assert 0.25 < (label < 0).double().mean() < 0.35
    expected = -group.model.log_prob(batch["x"], {"label": label}).sum() / (2000 * 4)
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-12)


# --- what goes together -----------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "method": "maximum_likelihood", "data": "walks", "model": {"name": "token_transformer", "vocabulary": 16},
    "engine": "torch", "training": {"samples": 64},
}  # fmt: skip


def test_tokens_and_numbers_do_not_mix() -> None:
    run = parse_run(Document(RUN, "test"))
    assert isinstance(run.sampler, Autoregressive)
    for changed, key, message in (
        ({"data": "rings"}, "data", "maximum_likelihood learns from tokens, rings has numbers"),
        ({"model": "mlp"}, "model", "needs a network of tokens, not mlp; there are: token_transformer"),
        ({"method": "flow_matching"}, "data", "flow_matching learns from numbers"),
        ({"sampler": "heun"}, "sampler", "these do: autoregressive"),
        ({"method": {"name": "token_ddo"}}, "roles.reference.weights", "needs the weights of its reference"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_run(Document(RUN | changed, "test"))
        assert caught.value.key == key
    flow = RUN | {"method": "flow_matching", "data": "rings", "model": "mlp", "sampler": "autoregressive"}
    with pytest.raises(ConfigError, match="does not draw what the run learns"):
        parse_run(Document(flow, "test"))
    with pytest.raises(ConfigError, match=r"not token_transformer; there are: .*mlp"):
        parse_run(Document(flow | {"sampler": "heun", "model": RUN["model"]}, "test"))
    assert not Heun.of_tokens


def test_a_beta_that_leaves_the_discriminator_at_one_half_is_refused() -> None:
    settings = RUN | {"method": {"name": "token_ddo", "beta": 0.01}, "roles": {"reference": {"weights": "somewhere"}}}
    with pytest.raises(ConfigError, match=r"with 16 coordinates beta = 0\.01") as caught:
        parse_run(Document(settings, "test"))
    assert caught.value.key == "method.beta"
