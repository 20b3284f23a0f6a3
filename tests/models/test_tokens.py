"""Token models: laws that sum to one, what each token may know, and the cache against teacher forcing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from gentrain.data.tokens import Walks
from gentrain.data.toys import Rings
from gentrain.models.token_transformer import TokenNetwork, TokenTransformer
from gentrain.models.tokens import TokenModel, given, groups_of, visible

ORDERS: dict[str, tuple[int, int, tuple[int, ...]]] = {"next token": (4, 3, ()), "next scale": (5, 2, (1, 2))}  # T, V, scales


def network_of(order: str, **settings: Any) -> TokenNetwork:
    """With weights that no longer make all tokens alike, float64."""
    length, vocabulary, scales = ORDERS[order]
    torch.manual_seed(0)
    model = TokenTransformer(vocabulary=vocabulary, scales=scales, layers=2, heads=2, head_dim=4, **settings)
    network: Any = model.build((length,), 2)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.double().eval()


def every_sequence(order: str) -> Tensor:
    length, vocabulary, _ = ORDERS[order]
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_probabilities_of_all_sequences_sum_to_one(order: str) -> None:
    model, tokens = TokenModel(network_of(order)), every_sequence(order)
    for label in (0, 1, -1):
        log_prob = model.log_prob(tokens, {"label": torch.full((len(tokens),), label)})
        assert log_prob.dtype == torch.float64 and log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert log_prob.std() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_a_token_knows_of_earlier_groups_alone(order: str) -> None:
    network, tokens = network_of(order), every_sequence(order)
    ends = torch.tensor([0, *network.groups]).cumsum(0).tolist()
    for place in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % ORDERS[order][1]
        changed = (network(tokens) - network(other)).abs().amax((0, 2)) > 1e-9
        after = next(end for end in ends if end > place)
        assert not changed[:after].any() and changed[after:].all()


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_cached_is_what_teacher_forcing_gives(order: str) -> None:
    network, tokens = network_of(order), every_sequence(order)
    model, condition, cache, first = TokenModel(network), {"label": torch.arange(len(tokens)) % 3 - 1}, {}, 0
    whole = model.logits(tokens, condition)
    for size in network.groups:
        found = model.next_logits(tokens[:, :first], condition, cache)
        torch.testing.assert_close(found, whole[:, first : first + size].float(), rtol=1e-5, atol=1e-6)
        first += size
    with pytest.raises(ValueError, match="not whole groups"):
        model.next_logits(tokens, condition, {})


def test_the_log_probability_is_the_sum_over_tokens() -> None:
    network, tokens = network_of("next token"), every_sequence("next token")
    law = network(tokens).log_softmax(2)
    expected = torch.tensor([sum(law[row, t, tokens[row, t]].item() for t in range(4)) for row in range(len(tokens))])
    torch.testing.assert_close(TokenModel(network).log_prob(tokens).float(), expected, rtol=1e-6, atol=1e-6)
    half = TokenModel(lambda tokens, condition: network(tokens).bfloat16())
    assert half.log_prob(tokens).dtype == torch.float32


@pytest.mark.parametrize("order", ORDERS)
def test_a_new_network_finds_all_sequences_equally_likely(order: str) -> None:
    length, vocabulary, scales = ORDERS[order]
    network = TokenTransformer(vocabulary=vocabulary, scales=scales).build((length,), 2)
    found = TokenModel(network).log_prob(every_sequence(order), {"label": torch.zeros(vocabulary**length, dtype=torch.int64)})
    assert found.tolist() == pytest.approx([-length * math.log(vocabulary)] * len(found), rel=1e-5)


def test_labels_count_and_none_is_null() -> None:
    network, tokens = network_of("next token"), every_sequence("next token")[:1]
    null, a, b = (network(tokens, {"label": torch.tensor([label])}) for label in (-1, 0, 1))
    assert torch.equal(network(tokens), null) and not torch.allclose(a, b) and not torch.allclose(a, null)


def test_dropout_is_in_training_alone() -> None:
    network, tokens = network_of("next token", dropout=0.5), every_sequence("next token")
    assert torch.equal(network(tokens), network(tokens))
    network.train()
    assert not torch.equal(network(tokens), network(tokens))


def test_a_scale_reads_the_sum_of_the_smaller_ones_on_the_last_grid() -> None:
    """The algorithm of the paper, image by image, with torch's own interpolation."""
    scales, tokens = (1, 2, 4), torch.randn(21, 3, dtype=torch.float64)
    grids = [part.T.reshape(1, 3, side, side) for part, side in zip(tokens.split([1, 4, 16]), scales, strict=True)]
    total, read = torch.zeros(1, 3, 4, 4, dtype=torch.float64), []
    for side, grid in zip(scales, grids, strict=True):
        read.append(adaptive_avg_pool2d(total, side).flatten(2)[0].T)
        total = total + interpolate(grid, size=(4, 4), mode="bilinear")
    torch.testing.assert_close(given(21, scales).double() @ tokens, torch.cat(read), rtol=1e-6, atol=1e-6)


def test_the_next_token_reads_the_one_before() -> None:
    assert given(3, ()).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert visible((1, 2)).tolist() == [[True, False, False], [True, True, True], [True, True, True]]


@pytest.mark.parametrize("scales", [(1, 3), (2, 1), (1, 1, 2)])
def test_scales_that_make_another_number_of_tokens_are_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="name growing sides"):
        groups_of(5, scales)


def test_data_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"16 values of a token .* set model\.vocabulary"):
        TokenTransformer(vocabulary=8).codec(Walks())
    with pytest.raises(ValueError, match="is for tokens, not for rings"):
        TokenTransformer(vocabulary=8).codec(Rings())
    with pytest.raises(ValueError, match=r"is for tokens \(T,\)"):
        TokenTransformer(vocabulary=8).build((1, 8, 8), 3)


def test_walks_go_by_their_label() -> None:
    data = Walks(held_out=500)
    batch = data.split("held_out").batch(torch.arange(500))
    steps = (batch["x"][:, 1:] - batch["x"][:, :-1]) % 16
    stride = (batch["label"] + 1)[:, None]
    assert ((steps == stride) | (steps == 16 - stride)).all() and batch["x"].dtype == torch.int64
    assert abs((steps == stride).double().mean() - 0.5) < 0.03 and batch["x"][:, 0].unique().numel() == 16
    with pytest.raises(ValueError, match="raise places"):
        Walks(places=4)
