import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.guidance import guided_x0


class LabelNetwork:
    """Predicts x0 = label (the null class: -1); counts calls and rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        self.rows.append(len(x))
        label = torch.full((len(x),), -1) if condition is None else condition["label"]
        return torch.ones_like(x) * label[:, None]


def guide(weight: float, condition: Condition | None) -> tuple[list[float], list[int]]:
    network = LabelNetwork()
    return guided_x0(Denoiser(network, RectifiedFlow(), "x0"), torch.zeros(2, 1), 0.5, condition, weight).flatten().tolist(), network.rows


def test_guidance_extrapolates_from_the_null_class_in_one_doubled_batch() -> None:
    assert guide(2.0, {"label": torch.tensor([1, 3])}) == ([-1 + 2 * 2, -1 + 2 * 4], [4])


def test_weight_zero_is_unconditional() -> None:
    assert guide(0.0, {"label": torch.tensor([1, 3])}) == ([-1, -1], [4])


def test_weight_one_and_no_condition_cost_one_plain_batch() -> None:
    assert guide(1.0, {"label": torch.tensor([1, 3])}) == ([1, 3], [2])
    assert guide(2.0, None) == ([-1, -1], [2])
