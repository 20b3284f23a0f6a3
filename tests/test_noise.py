"""The counter-based generator: what belongs to a row, and that it is random."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from gentrain.noise import Noise, derive

COUNT = 1_000_000


def draws(noise: Noise, rows: int) -> list[Tensor]:
    """One call of each kind, in a fixed order, with odd sizes."""
    return [
        noise.normal((rows, 3, 5)),
        noise.uniform((rows,)),
        noise.randint(0, 1000, (rows, 7)),
        noise.bernoulli(0.3, (rows, 4)),
        noise.normal((rows, 3), torch.float64),
        noise.normal((rows,)),
    ]


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [2, 4, 6]])
def test_a_row_gets_the_same_numbers_however_the_rows_are_split(sizes: list[int]) -> None:
    rows = torch.arange(100, 112)
    whole = draws(Noise(3, rows), 12)
    parts = [draws(Noise(3, part), len(part)) for part in rows.split(sizes)]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected)


def test_rows_may_come_in_any_order() -> None:
    rows, order = torch.arange(8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.equal(Noise(0, rows[order]).normal((8, 6)), Noise(0, rows).normal((8, 6))[order])


def test_repeats_bit_for_bit_and_calls_differ() -> None:
    first, second = Noise(0, torch.arange(4)), Noise(0, torch.arange(4))
    a, b = first.normal((4, 10)), first.normal((4, 10))
    assert torch.equal(a, second.normal((4, 10))) and torch.equal(b, second.normal((4, 10)))
    assert not torch.isclose(a, b).any()


def test_the_numbers_do_not_change_between_releases() -> None:
    """A run resumed with a later release must meet the noise it would have met."""
    noise = Noise(0, torch.tensor([0, 123456789]))
    assert noise.randint(0, 1_000_000, (2, 3)).tolist() == [[593701, 425369, 748556], [255322, 951748, 839768]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 1000, COUNT])
def test_normal_is_standard_normal(rows: int, seed: int) -> None:
    """A million numbers in one row, in many, and in as many rows: moments within 4.5 standard errors, Kolmogorov-Smirnov p > 1e-4."""
    x = Noise(derive(seed, "test"), torch.arange(rows)).normal((rows, COUNT // rows))
    assert x.dtype == torch.float32 and x.isfinite().all()
    x = x.double().flatten()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**power).mean().item() - moment) < 4.5 * (variance / COUNT) ** 0.5
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-4
    assert 4.3 < x.abs().max() < 6.8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, COUNT])
def test_uniform_is_uniform_and_never_reaches_one(rows: int, seed: int) -> None:
    x = Noise(derive(seed, "test"), torch.arange(rows)).uniform((rows, COUNT // rows)).flatten()
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    assert stats.kstest(x.double().numpy(), "uniform").pvalue > 1e-4
    scaled = Noise(0, torch.arange(10)).uniform((10, 100), low=-2, high=3)
    assert -2 <= scaled.min() < -1.9 and 2.9 < scaled.max() < 3
    assert Noise(0, torch.arange(100_000)).uniform((100_000,), low=1000, high=1000.001).max() < 1000.001  # 16 floats lie between


def test_randint_and_bernoulli_have_their_frequencies() -> None:
    noise = Noise(0, torch.arange(1000))
    counts = torch.bincount(noise.randint(-3, 7, (1000, 1000)).flatten() + 3, minlength=10)
    assert len(counts) == 10 and stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert abs(noise.bernoulli(0.1, (1000, 1000)).float().mean().item() - 0.1) < 4.5 * (0.09 / COUNT) ** 0.5
    assert not noise.bernoulli(0.0, (1000,)).any() and noise.bernoulli(1.0, (1000,)).all()


def test_rows_calls_streams_and_positions_are_uncorrelated() -> None:
    """500 sequences of 2,000 numbers: neighbouring rows, positions, calls, seeds, purposes. All 124,750 correlations within 5.5 errors."""
    rows, length = torch.arange(100), 2000
    noise = Noise(derive(0, "train"), rows)
    sequences = torch.cat(
        [
            noise.normal((100, length)),
            noise.normal((100, length)),
            Noise(derive(1, "train"), rows).normal((100, length)),
            Noise(derive(0, "sample"), rows).normal((100, length)),
            Noise(derive(0, "train"), rows + 100).normal((100, length)),
        ]
    )
    for values in (sequences.double(), sequences.double().square()):
        correlation = torch.corrcoef(values)
        off_diagonal = correlation[torch.triu_indices(500, 500, offset=1).unbind()]
        assert off_diagonal.abs().max() < 5.5 / length**0.5
        lagged = (values[:, 1:] - values.mean()) * (values[:, :-1] - values.mean())
        assert abs(lagged.mean() / values.var()) < 5 / lagged.numel() ** 0.5


def test_float64_normals_use_the_finer_type() -> None:
    x = Noise(0, torch.arange(10)).normal((10, 100), torch.float64)
    assert x.dtype == torch.float64
    assert (x != x.float().double()).float().mean() > 0.99
    torch.testing.assert_close(Noise(0, torch.arange(10)).normal((10, 100)).double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_normals_are_rounded_float32(dtype: torch.dtype) -> None:
    assert torch.equal(Noise(0, torch.arange(4)).normal((4, 9), dtype), Noise(0, torch.arange(4)).normal((4, 9)).to(dtype))


def test_derived_seeds_are_distinct_and_never_negative() -> None:
    seeds = {derive(seed, *parts) for seed in range(200) for parts in [(), ("a",), ("b",), ("a", "b"), ("b", "a"), (0,), (1,), ("a", 0)]}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_shape_without_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="first dimension must be the 3 samples"):
        Noise(0, torch.arange(3)).normal((4, 2))
