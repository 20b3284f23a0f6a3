from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gentrain.recipes.features import CACHE, cached_features


class Judge(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.asked = nn.Linear(4, 3), 0

    def features(self, x: Tensor) -> Tensor:
        self.asked += 1
        return self.layer(x)


def test_features_of_the_same_rows_and_weights_are_computed_once(tmp_path: Path) -> None:
    judge, x = Judge(0), torch.randn(7, 4)
    first, second = cached_features(tmp_path, judge, x), cached_features(tmp_path, judge, x.clone())
    assert judge.asked == 1 and torch.equal(first, second) and torch.equal(first, judge.layer(x))


def test_other_rows_or_weights_are_never_mistaken_for_them(tmp_path: Path) -> None:
    judge, x = Judge(0), torch.randn(7, 4)
    cached_features(tmp_path, judge, x)
    other = x.clone()
    other[3, 2] += 1e-6
    assert torch.equal(cached_features(tmp_path, judge, other), judge.layer(other))
    assert torch.equal(cached_features(tmp_path, judge, x[:6]), judge.layer(x[:6]))
    changed = Judge(1)
    assert torch.equal(cached_features(tmp_path, changed, x), changed.layer(x))
    assert len(list((tmp_path / CACHE).iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100])
def test_a_damaged_file_is_made_anew(content: bytes, tmp_path: Path) -> None:
    judge, x = Judge(0), torch.randn(7, 4)
    right = cached_features(tmp_path, judge, x)
    file = next((tmp_path / CACHE).iterdir())
    whole = file.read_bytes()
    file.write_bytes(content)
    assert torch.equal(cached_features(tmp_path, judge, x), right) and file.read_bytes() == whole


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / CACHE).write_text("in the way")
    judge, x = Judge(0), torch.randn(7, 4)
    assert torch.equal(cached_features(tmp_path, judge, x), judge.layer(x))
