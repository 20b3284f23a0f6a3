import pytest
import torch

from gentrain.metrics.distances import frechet_distance
from gentrain.metrics.unlearning import forget_accuracy, override_rate, remain_accuracy, remain_distance

ASKED = torch.tensor([3, 3, 3, 3, 0, 1, 2, 4])
READ = torch.tensor([3, 8, 8, 5, 0, 1, 3, 3])  # a 2 and a 4 read as the forgotten 3: no business of the forget accuracy


def test_each_rate_is_divided_by_the_samples_it_is_about() -> None:
    forget = forget_accuracy(READ, ASKED, 3, "forget")
    assert forget.value == 1 / 4 and forget.better == "lower" and "of 4 samples" in forget.definition
    override = override_rate(READ, ASKED, 3, 8, "override")
    assert override.value == 2 / 4 and override.better == "higher"
    remain = remain_accuracy(READ, ASKED, [3], "remain")
    assert remain.value == 2 / 4 and remain.better == "higher" and "of 4 samples" in remain.definition


def test_samples_of_other_classes_do_not_dilute_the_forget_accuracy() -> None:
    """The published evaluator divides by all images: ten classes make its number ten times as good."""
    many = torch.cat([ASKED, torch.zeros(1000, dtype=torch.int64)])
    assert forget_accuracy(torch.cat([READ, many[8:]]), many, 3, "forget").value == 1 / 4


def test_another_forgotten_class_in_its_place_is_none_forgotten() -> None:
    forget = forget_accuracy(READ, ASKED, 3, "forget", (3, 8))
    assert forget.value == 3 / 4 and "or another forgotten one" in forget.definition
    assert remain_accuracy(READ, ASKED, (3, 0, 1), "remain").value == 0


def test_no_hit_is_no_certainty() -> None:
    none = forget_accuracy(torch.zeros(100, dtype=torch.int64), torch.full((100,), 3), 3, "forget")
    assert none.value == none.low == 0 and none.high == pytest.approx(1.96**2 / (100 + 1.96**2), rel=1e-3)  # Wilson 1927


def test_the_distance_is_of_the_classes_that_remain_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(400, 3, generator=generator), torch.randn(300, 3, generator=generator)
    asked, label = torch.arange(400) % 4, torch.arange(300) % 4
    far, far_real = features.clone(), real.clone()
    far[asked == 3], far_real[label == 3] = 100.0, -100.0
    found = remain_distance(far, asked, far_real, label, [3], "distance")
    assert found == remain_distance(features, asked, real, label, [3], "distance")
    assert f"uncorrected {frechet_distance(features[asked != 3], real[label != 3]):.4g}" in found.definition
    assert "300 against 225" in found.definition


@pytest.mark.parametrize("asked, said", [(torch.zeros(4, dtype=torch.int64), "no sample is asked for the forgotten class 3")])
def test_samples_without_the_forgotten_class_are_refused(asked: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        forget_accuracy(asked, asked, 3, "forget")
    with pytest.raises(ValueError, match="no sample is asked for a class that remains"):
        remain_accuracy(asked + 3, asked + 3, [3], "remain")
