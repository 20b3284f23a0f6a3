import torch

from gentrain.paths.rectified_flow import RectifiedFlow


def test_path_is_the_straight_line_from_data_to_noise() -> None:
    x0, eps, t = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[3.0], [3.0], [3.0]]), torch.tensor([0.0, 0.5, 1.0])
    assert RectifiedFlow().perturb(x0, eps, t).flatten().tolist() == [1, 2, 3]
    assert RectifiedFlow().velocity(x0, eps, t).flatten().tolist() == [2, 2, 2]
    assert RectifiedFlow().network_time(t).tolist() == [0, 500, 1000]
