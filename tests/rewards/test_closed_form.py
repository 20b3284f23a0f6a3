import io

import pytest
import torch
from PIL import Image

from gentrain.config import ConfigError, Document, build
from gentrain.data.toys import Rings
from gentrain.rewards.base import Reward
from gentrain.rewards.networks import ClassifierProbability


def built(settings: object) -> Reward:
    return build(Reward, Document(settings if isinstance(settings, dict) else {"name": settings}, "x.yaml"))


def images(count: int = 3, channels: int = 3, side: int = 6) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_brightness_symmetry_and_colour_by_their_formulas() -> None:
    x = images().double()
    p = (x + 1) / 2
    torch.testing.assert_close(built("brightness")(x, {}, {}).double(), p.mean((1, 2, 3)), rtol=1e-6, atol=1e-6)
    for axis, dim in (("vertical", 3), ("horizontal", 2)):
        expected = 1 - (p - p.flip(dim)).square().mean((1, 2, 3))
        torch.testing.assert_close(built({"name": "symmetry", "axis": axis})(x, {}, {}).double(), expected, rtol=1e-6, atol=1e-6)
    target = torch.tensor([0.0, 0.5, 1.0]).double()[:, None, None]
    found = built({"name": "colour", "colour": [0.0, 0.5, 1.0]})(x, {}, {})
    torch.testing.assert_close(found.double(), 1 - (p - target).square().mean((1, 2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "colour", "symmetry"])
def test_closed_forms_stay_in_their_range_and_pass_gradients_within_it(name: str) -> None:
    reward, x = built(name), (3 * images()).requires_grad_()
    scores = reward(x, {}, {})
    low, high = reward.range
    assert reward.differentiable and scores.dtype == torch.float32 and (low <= scores).all() and (scores <= high).all()
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    inside = x.detach().abs() < 1
    assert (gradient[inside] != 0).any() and (gradient[~inside] == 0).all()


def test_a_reward_of_a_row_depends_on_that_row_alone() -> None:
    x = images()
    for name in ("brightness", "symmetry", "colour", "jpeg"):
        torch.testing.assert_close(built(name)(x, {}, {})[1:2], built(name)(x[1:2], {}, {}))


def test_jpeg_is_the_size_of_the_file() -> None:
    x = images(side=16)
    file = io.BytesIO()
    pixels = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    small, large = (built({"name": "jpeg", "want": want})(x.requires_grad_(), {}, {}) for want in ("small", "large"))
    assert small[0].item() == pytest.approx(-file.tell() / 1000) and torch.equal(small, -large)
    assert not small.requires_grad and not built("jpeg").differentiable
    flat = built("jpeg")(torch.zeros(1, 1, 16, 16), {}, {})
    assert flat.item() > small.max().item()


def test_the_probability_of_a_class() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    x, asked = torch.zeros(3, 1, 4, 4), {"label": torch.tensor([2, 1, -1])}
    log = logits.double().log_softmax(1)
    for scale, value in (("log", log), ("probability", log.exp())):
        reward = ClassifierProbability(scale=scale)  # type: ignore[arg-type]
        reward.check_data(Rings(rings=3))
        expected = torch.stack([value[0, 2], value[1, 1], torch.zeros((), dtype=torch.float64)]).float()
        torch.testing.assert_close(reward(x, asked, {"judge": lambda x: logits}), expected)
    reward = ClassifierProbability(target=0)
    reward.check_data(Rings(rings=3))
    torch.testing.assert_close(reward(x, {}, {"judge": lambda x: logits}), log[:, 0].float())


def test_data_that_a_reward_cannot_judge_are_told() -> None:
    for name in ("brightness", "colour", "symmetry", "jpeg"):
        with pytest.raises(ValueError, match="it reads images with"):
            built(name).check_data(Rings(rings=3))
    with pytest.raises(ConfigError, match=r"must have values in \[0, 1\]"):
        built({"name": "colour", "colour": [2.0]})


def test_every_reward_says_what_it_is() -> None:
    for name, reward in Reward.available().items():
        low, high = reward.range
        assert low < high, name
        assert reward.licence and reward.needs, name
