import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, Document, build
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.samplers.base import Sampler
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.guided import AutoGuided, Guided, dynamic_threshold
from gentrain.samplers.heun import Heun
from tests.samplers.toy import CONDITION, SHAPE, noise_for, toy_network


def draw(sampler: Sampler, denoiser: Denoiser) -> Tensor:
    return sampler.sample(denoiser, SHAPE, noise_for(), CONDITION)


@pytest.mark.parametrize("inner", [Heun(), DDIM(eta=0.5)])
def test_an_interval_of_all_levels_is_guidance_and_of_none_is_no_guidance(inner: Sampler) -> None:
    denoiser = Denoiser(toy_network, RectifiedFlow(), "velocity")
    always, never = Guided(sampler=inner, steps=5, guidance=3.0), Guided(sampler=inner, steps=5, guidance=3.0, low=1e9, high=2e9)
    for ours, guidance in ((always, 3.0), (never, 1.0)):
        plain = type(inner)(**{**vars(inner), "steps": 5, "guidance": guidance})
        torch.testing.assert_close(draw(ours, denoiser), draw(plain, denoiser), rtol=1e-5, atol=1e-5)


def test_guidance_acts_inside_of_the_interval_only() -> None:
    """The batch is doubled at the steps whose noise level lies within."""
    path, seen = VarianceExploding(), []

    def network(x: Tensor, t: Tensor, condition: dict | None) -> Tensor:
        seen.append((len(x), (t[0] / 250).exp().item()))
        return toy_network(x, t, condition)

    draw(Guided(sampler=DDIM(), steps=12, guidance=2.0, low=0.1, high=3.0), Denoiser(network, path, "edm"))
    assert [rows == 12 for rows, _ in seen] == [0.1 <= level <= 3.0 for _, level in seen]
    assert 0 < sum(rows == 12 for rows, _ in seen) < 12


def test_rows_at_different_levels_are_guided_each_by_itself() -> None:
    sampler, path = Guided(guidance=2.0, low=0.5, high=2.0), RectifiedFlow()
    from gentrain.samplers.guidance import guided_x0
    from gentrain.samplers.guided import _Steered

    plain = Denoiser(toy_network, path, "velocity")
    x, t = noise_for().normal(SHAPE), torch.tensor([0.1, 0.4, 0.5, 0.6, 0.8, 0.9])  # levels 0.11, 0.67, 1, 1.5, 4, 9
    found = _Steered(plain, sampler).x0(x, t, CONDITION)
    inside = torch.tensor([False, True, True, True, False, False])
    guided, conditional = guided_x0(plain, x, t, CONDITION, 2.0), plain.x0(x, t, CONDITION)
    assert torch.equal(found[inside], guided[inside]) and torch.equal(found[~inside], conditional[~inside])


def test_dynamic_thresholding_scales_each_row_by_its_quantile() -> None:
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])
    found = dynamic_threshold(x0, 0.5)
    s = 2.0  # the median of |x|
    torch.testing.assert_close(found[0], x0[0].clamp(-s, s) / s)
    assert torch.equal(found[1], x0[1])  # within [-1, 1]: left alone
    wild = Guided(sampler=Heun(), steps=5, guidance=20.0)
    denoiser = Denoiser(toy_network, RectifiedFlow(), "velocity")
    assert draw(wild, denoiser).abs().max() > 1.5
    tame = Guided(sampler=Heun(), steps=5, guidance=20.0, threshold=0.9)
    assert draw(tame, denoiser).abs().max() <= 1.0 + 1e-5


def test_autoguidance_moves_away_from_the_weaker_model() -> None:
    path = RectifiedFlow()
    strong = Denoiser(lambda x, t, c: torch.full_like(x, 2.0), path, "x0")
    weak = Denoiser(lambda x, t, c: torch.full_like(x, 1.5), path, "x0")
    for weight, expected in ((0.0, 1.5), (1.0, 2.0), (3.0, 3.0)):
        x = draw(Heun(steps=3), AutoGuided(strong, weak, weight))
        torch.testing.assert_close(x, torch.full(SHAPE, expected))


def test_both_models_of_autoguidance_are_asked_for_the_same_classes() -> None:
    """A model that is its own weaker one moves nothing."""
    denoiser = Denoiser(toy_network, RectifiedFlow(), "velocity")
    x, t = noise_for().normal(SHAPE), torch.full(SHAPE[:1], 0.5)
    found = AutoGuided(denoiser, denoiser, 3.0).x0(x, t, CONDITION)
    torch.testing.assert_close(found, denoiser.x0(x, t, CONDITION))
    assert (found - denoiser.x0(x, t, None)).abs().max() > 0.01


def test_mistakes_name_the_key() -> None:
    def read(values: dict) -> Sampler:
        return build(Sampler, Document({"name": "guided", **values}, "x.yaml"))

    assert read({"sampler": {"name": "ddim", "eta": 0.5}, "steps": 7, "guidance": 2}).steps == 7
    for values, said in (
        ({"sampler": "consistency"}, r"sampler: consistency is no sampler that steps by x0 predictions"),
        ({"sampler": {"name": "heun", "guidance": 2}}, r"sampler\.guidance: set the guidance of `guided` itself"),
        ({"low": 2.0, "high": 1.0}, r"high: high 1.0 is below low 2.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(values)
