"""Sampling of tokens: the law of what is drawn, with and without guidance and truncation; noise that belongs to samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.models.tokens import TokenModel
from gentrain.noise import Noise
from gentrain.samplers.autoregressive import Autoregressive, draw, truncated
from gentrain.samplers.euler import Euler
from tests.models.test_tokens import ORDERS, every_sequence, network_of

COUNT = 20_000


def drawn(sampler: Autoregressive, order: str, label: int | None = 0, count: int = COUNT) -> Tensor:
    condition = None if label is None else {"label": torch.full((count,), label)}
    return sampler.sample(TokenModel(network_of(order)), (count, ORDERS[order][0]), Noise(3, torch.arange(count)), condition)


def shares(tokens: Tensor, order: str) -> Tensor:
    length, vocabulary, _ = ORDERS[order]
    place = (tokens * vocabulary ** torch.arange(length - 1, -1, -1)).sum(1)
    return place.bincount(minlength=vocabulary**length).double() / len(tokens)


def variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("label", [0, 1, None])
def test_samples_follow_the_law_of_the_model(order: str, label: int | None) -> None:
    """Four seeds of the noise gave .020 to .024 (81 sequences) and .005 to .009 (32); the two labels differ by .103 and .303."""
    condition = None if label is None else {"label": torch.full((len(every_sequence(order)),), label)}
    law = TokenModel(network_of(order)).log_prob(every_sequence(order), condition).exp()
    assert variation(shares(drawn(Autoregressive(), order, label), order), law) < 0.035


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_and_temperature_tilt_the_law_of_each_token(order: str) -> None:
    """By enumeration: logits null + w (conditional - null), divided by the temperature."""
    sequences, network = every_sequence(order), network_of(order)
    label = {"label": torch.zeros(len(sequences), dtype=torch.int64)}
    mixed = network(sequences) + 2.5 * (network(sequences, label) - network(sequences))
    law = (mixed / 0.7).log_softmax(2).gather(2, sequences[:, :, None]).sum((1, 2)).exp()
    found = shares(drawn(Autoregressive(guidance=2.5, temperature=0.7), order), order)
    plain = shares(drawn(Autoregressive(), order), order)
    assert variation(found, law) < 0.035 < 0.1 < variation(plain, law)


def test_a_sample_is_the_same_among_others_and_alone() -> None:
    every = drawn(Autoregressive(), "next token", count=6)
    noise = Noise(3, torch.tensor([4]))
    alone = Autoregressive().sample(TokenModel(network_of("next token")), (1, 4), noise, {"label": torch.tensor([0])})
    assert torch.equal(alone, every[4:5])


def test_the_likeliest_values_are_kept() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    kept = [truncated(logits, *limits).isfinite()[0].tolist() for limits in ((1, None), (2, None), (9, None), (None, 0.0), (None, 0.5))]
    assert kept == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert truncated(logits, None, 0.55).isfinite()[0].tolist() == [1, 0, 1, 0]
    assert truncated(logits, 2, 0.7).isfinite()[0].tolist() == [1, 0, 1, 0]  # of 5/8 and 3/8: the first is not enough
    assert truncated(logits, 2, 0.6).isfinite()[0].tolist() == [1, 0, 0, 0]
    assert torch.equal(truncated(logits, None, 1.0), logits)
    only = draw(truncated(torch.randn(500, 3, 8), 1, None), Noise(0, torch.arange(500)))
    assert only.shape == (500, 3)


def test_truncated_values_are_never_drawn() -> None:
    logits = torch.randn(2000, 2, 8, generator=torch.Generator().manual_seed(0))
    found = draw(truncated(logits, 3, None), Noise(0, torch.arange(2000)))
    rank = (logits > logits.gather(2, found[:, :, None])).sum(2)
    assert rank.max() == 2 and (rank == 2).any()


@pytest.mark.parametrize("settings, law", [({}, None), ({"top_p": 1}, None), ({"guidance": 2}, "guidance 2"), ({"top_k": 5}, "top_k 5"),
                                           ({"top_p": 0.9}, "top_p 0.9"), ({"temperature": 0.5}, "temperature 0.5")])  # fmt: skip
def test_a_sampler_says_what_makes_its_samples_others(settings: dict[str, Any], law: str | None) -> None:
    assert Autoregressive(**settings).other_law == law


def test_it_passes_once() -> None:
    with pytest.raises(ValueError, match="leave steps out"):
        Autoregressive(steps=2)


def test_it_tells_what_changes_its_law_and_no_steps() -> None:
    assert Autoregressive().told == "autoregressive, guidance 1"
    assert Autoregressive(temperature=0.5, top_k=3, top_p=0.9).told == "autoregressive, guidance 1, temperature 0.5, top_k 3, top_p 0.9"
    assert Euler(steps=3, guidance=2).told == "euler, 3 steps, guidance 2"
