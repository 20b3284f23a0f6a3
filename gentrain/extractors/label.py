"""The class as a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from gentrain.config import option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.models.control import Form
from gentrain.rewards.base import Judge, Networks


@register("label")
@dataclass
class Label(Extractor):
    """The class of an item, for a generator that knows none; p(c | x) is what a trained classifier finds."""

    labels: ClassVar[bool] = True
    error_is: ClassVar[str] = "share of samples read as another class than asked for"

    role: str = option("judge", "names the role of the classifier: roles.<role>.weights is its run")

    def networks(self) -> dict[str, Judge]:
        return {self.role: Judge(classifier=True)}

    def check_data(self, data: Data) -> None:
        self.count = len(data.class_names)
        if not self.count:
            raise ValueError(f"the control label needs data with classes, which {data.registered_name} has not")

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form(classes=self.count)

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        return self._logits(x, networks).argmax(1)

    def loss(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return cross_entropy(self._logits(x, networks), control, reduction="none")

    def error(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return (self.read(x, networks) != control).float()

    def _logits(self, x: Tensor, networks: Networks) -> Tensor:
        return networks[self.role](x.clamp(-1, 1)).float()
