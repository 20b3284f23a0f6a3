import torch

from gentrain.domains.roots import increasing_root


def test_roots_of_curves_that_mislead_newton():
    """arctan sends Newton away from the root, a cube flattens at it, an exponential overshoots."""
    target = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)
    low, high = torch.full_like(target, -50), torch.full_like(target, 60)
    root = increasing_root(lambda u: ((u - target).atan(), 1 / (1 + (u - target) ** 2)), low, high, torch.full_like(target, 40))
    assert torch.allclose(root, target, atol=1e-12)
    root = increasing_root(lambda u: ((u - target) ** 3, 3 * (u - target) ** 2), low, high, torch.zeros_like(target))
    assert torch.allclose(root, target, atol=1e-8)
    root = increasing_root(lambda u: (u.exp() - target.exp(), u.exp()), low, high, low)
    assert torch.allclose(root, target, atol=1e-12)
