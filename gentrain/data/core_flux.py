"""Steady states of the core metabolism of E. coli: points of a polytope."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from xml.etree import ElementTree

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data, TensorItems, check_split, packaged_file
from gentrain.data.bins import Bins
from gentrain.domains.polytope import Polytope
from gentrain.noise import Noise, derive

_GROWTH = "Biomass_Ecoli_core"
_NAMESPACES = {"sbml": "http://www.sbml.org/sbml/level3/version1/core"}
_FBC = "{http://www.sbml.org/sbml/level3/version1/fbc/version2}"
_ROUNDING = 1e-6  # of a linear program's optimum, relative to the bounds' scale


@register("core_flux")
@dataclass
class CoreFlux(Data):
    """Fluxes v of the 95 reactions of the E. coli core model with S v = 0 and bounds, uniform in that polytope, by growth rate.

    x are coordinates in `domain`, a polytope with equalities, of v in units of each flux's own range (`fluxes` gives v back, in mmol per
    gram dry weight and hour). Reactions that the bounds leave no choice are equalities too; bounds that no steady state reaches are left
    out. 24 dimensions are left: of the 28 of S v = 0 four are uptakes of substrates that the medium lacks.
    Classes are bins of the growth rate.
    """

    train: PositiveInt = option(10_000, "items of the train split", unit="items")
    held_out: PositiveInt = option(2_000, "items of the held-out split", unit="items")
    limits: list[float] = option(
        lambda: [0.01, 0.022, 0.038, 0.066], "growth rates between the classes, ascending; by default fifths of the uniform law", unit="1/h"
    )
    seed: NonNegativeInt = option(0, "another seed, other items")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.domain.dim,)

    def __post_init__(self) -> None:
        if sorted(set(self.limits)) != self.limits or not self.limits:
            raise ConfigError(f"expected growth rates in ascending order, got {self.limits}", key="limits")

    @property
    def class_names(self) -> Sequence[str]:
        return self._bins.names

    @property
    def licence(self) -> str:
        return "E. coli core model (J. D. Orth, R. M. T. Fleming, B. O. Palsson 2010), as distributed in cobra (LGPL-2.0+ or GPL-2.0+)"

    @cached_property
    def domain(self) -> Polytope:
        stoichiometry, low, high, _ = self._model
        middle, scale = self._middle, self._scale
        fixed = scale == 0
        identity = torch.eye(len(low), dtype=torch.float64)
        unit = torch.where(fixed, 1, scale)
        upper, lower = (self._range[:, 1] >= high - _ROUNDING * unit) & ~fixed, (self._range[:, 0] <= low + _ROUNDING * unit) & ~fixed
        return Polytope(
            A=torch.cat([identity[upper], -identity[lower]]),
            b=torch.cat([((high - middle) / unit)[upper], ((middle - low) / unit)[lower]]),
            C=torch.cat([stoichiometry * scale, identity[fixed]]),
            d=torch.cat([-stoichiometry @ middle, torch.zeros(int(fixed.sum()), dtype=torch.float64)]),
        )

    def fluxes(self, x: Tensor) -> Tensor:
        """x [B, D] -> v [B, 95], float64, in the order of `reactions`."""
        return self._middle + self._scale * self.domain.to_full(x)

    @property
    def reactions(self) -> Sequence[str]:
        return self._model[3]

    def growth_rate(self, x: Tensor) -> Tensor:
        """[B], 1/h."""
        return self.fluxes(x)[:, self.reactions.index(_GROWTH)]

    def split(self, name: str) -> TensorItems:
        check_split(name)
        if name not in self._drawn:  # hit-and-run takes seconds, and a run asks several times
            count = self.held_out if name == "held_out" else self.train
            x = self.domain.uniform(Noise(derive(self.seed, name), torch.arange(count)), (count, *self.shape))
            self._drawn[name] = TensorItems(x, self._bins.label(self.growth_rate(x)))
        return self._drawn[name]

    @cached_property
    def _drawn(self) -> dict[str, TensorItems]:
        return {}

    @property
    def _bins(self) -> Bins:
        low, high = self._range[self.reactions.index(_GROWTH)].tolist()
        return Bins("growth rate", (max(low, 0), *self.limits, high))

    @cached_property
    def _model(self) -> tuple[Tensor, Tensor, Tensor, Sequence[str]]:
        """S [72, 95], lower and upper bounds [95], names of the reactions."""
        # the file is all that is needed of the package, whose own dependencies include an older pandas than others ask for
        with gzip.open(packaged_file("core_flux", "cobra", "data/textbook.xml.gz", "pip install --no-deps cobra")) as file:
            model = ElementTree.parse(file).getroot()
        parameters = {item.attrib["id"]: float(item.attrib["value"]) for item in model.iterfind(".//sbml:parameter", _NAMESPACES)}
        metabolites = [
            item.attrib["id"] for item in model.iterfind(".//sbml:species", _NAMESPACES) if item.attrib["boundaryCondition"] == "false"
        ]
        reactions = model.findall(".//sbml:reaction", _NAMESPACES)
        stoichiometry = torch.zeros(len(metabolites), len(reactions), dtype=torch.float64)
        for column, reaction in enumerate(reactions):
            for side, sign in (("Reactants", -1), ("Products", 1)):
                for item in reaction.iterfind(f"sbml:listOf{side}/sbml:speciesReference", _NAMESPACES):
                    stoichiometry[metabolites.index(item.attrib["species"]), column] += sign * float(item.attrib["stoichiometry"])
        bounds = [[parameters[reaction.attrib[f"{_FBC}{side}FluxBound"]] for reaction in reactions] for side in ("lower", "upper")]
        low, high = torch.tensor(bounds, dtype=torch.float64)
        return stoichiometry, low, high, [reaction.attrib["id"].removeprefix("R_") for reaction in reactions]

    @cached_property
    def _range(self) -> Tensor:
        """[95, 2] the least and the largest value of each flux over all steady states (flux variability)."""
        from scipy.optimize import linprog

        stoichiometry, low, high, _ = self._model
        bounds = torch.stack([low, high], 1).tolist()
        zero = torch.zeros(len(stoichiometry))
        ends = [
            [sign * linprog(sign * goal, None, None, stoichiometry, zero, bounds).fun for sign in (1, -1)] for goal in torch.eye(len(low))
        ]
        return torch.tensor(ends, dtype=torch.float64)

    @property
    def _middle(self) -> Tensor:
        return self._range.mean(1)

    @property
    def _scale(self) -> Tensor:
        """Half the range of each flux, 0 where it is fixed."""
        half = (self._range[:, 1] - self._range[:, 0]) / 2
        return torch.where(half > _ROUNDING, half, 0)
