"""Paths that stay inside a convex set: both ends of every path lie in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise
from gentrain.paths.space import Space

_PROBED = 1_000  # training items that are looked at
_ROUNDED = 1e-6  # what float32 leaves of 1 less the sum of proportions that are all there
_FURTHEST = 1e-3  # from the set, of a sample's own size: what rounding and unit conversions leave
MARGIN = 1e-6  # slack of data on the boundary, where neither the kernel's score nor stick-breaking exists


def domain_of(data: Data, domain: Domain | None) -> Domain:
    """The domain of a space: the one configured, else the data set's. Raises ValueError when there is none or the samples do not fit it."""
    found = domain or data.domain
    if found is None:
        raise ValueError(f"the data set {data.registered_name} brings no domain; name one, such as domain: box")
    found.check_shape(data.shape)
    return found


def first_items(data: Data, count: int) -> Tensor:
    """x of `count` training items at most, as shuffled: [B, *shape]. Raises ConfigError, about the data, for none or NaN or infinity."""
    items = data.split("train")
    if not len(items):
        raise ConfigError(f"{data.registered_name} has no training samples; correct what it reads", key="data")
    x = next(iter(Loader(items, seed=0, batch_size=min(len(items), count))))[0]["x"]
    if wrong := int((~x.isfinite().flatten(1).all(1)).sum()):
        raise ConfigError(f"{wrong} of {len(x)} training samples hold NaN or infinity; leave them out, or fill them in", key="data")
    return x


def _all_there(rest: Tensor) -> bool:
    """Whether samples hold all proportions, [B] being 1 less their sums: 0, or, as printed with some digits, a little to either side."""
    return float(rest.abs().max()) < (_FURTHEST if float(rest.min()) < -_ROUNDED else _ROUNDED)


def require_held(domain: Domain, data: Data) -> None:
    """Raises ValueError when training samples lie outside of the domain, further than rounding puts data with real zeros.

    Also when all of them lie on the simplex's last face, as those do that hold the last proportion too.
    """
    x = first_items(data, _PROBED).double()
    if isinstance(domain, Simplex) and _all_there(domain.parts(x)[:, -1]):
        raise ValueError(
            f"the {domain.dim} proportions of each of {len(x)} training samples add up to 1, so that the last of {domain.dim + 1}, which "
            "the simplex appends, is 0; leave one of them out of the data, and out of dim"
        )
    away = (domain.interior(x) - x).flatten(1).norm(dim=1)
    outside = away > _FURTHEST * (1 + x.flatten(1).norm(dim=1))
    if bool(outside.any()):
        raise ValueError(
            f"{int(outside.sum())} of {len(x)} training samples lie outside of {domain.registered_name}, the furthest "
            f"{float(away.max()):.3g} away from where it would be moved; name a domain that holds the data"
        )


@register("inside")
@dataclass
class Inside(Space):
    """The data's own coordinates, with noise uniform in the set; samplers that reflect keep to it (arXiv:2405.16577, arXiv:2304.04740)."""

    domain: Domain | None = option(None, "the convex set; null = that of the data set")

    def __post_init__(self) -> None:
        self._set = self.domain

    @property
    def normal(self) -> bool:
        return False

    @property
    def bounds(self) -> Domain | None:
        return self._set

    def encode(self, x: Tensor) -> Tensor:
        assert self._set is not None
        return self._set.interior(x, MARGIN)

    def prior(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        assert self.bounds is not None
        return self.bounds.uniform(noise, shape)

    def fit(self, data: Data) -> None:
        self._set = domain_of(data, self.domain)

    def check(self, data: Data) -> None:
        assert self._set is not None
        require_held(self._set, data)


@register("stick_breaking")
@dataclass
class StickBreaking(Inside):
    """The simplex as a cube: u_k = x_k / (1 - x_1 - ... - x_(k-1)), the share of what is left that part k takes
    (arXiv:2304.04740, section 6).

    For `reflected_heat`, whose kernel is that of a cube. The first parts are resolved best: put the largest first.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cube = Box(low=0.0, high=1.0)

    @property
    def bounds(self) -> Domain | None:
        return self._cube

    def encode(self, x: Tensor) -> Tensor:
        assert isinstance(self._set, Simplex)
        return self._set.to_cube(self._set.interior(x, MARGIN))

    def decode(self, z: Tensor) -> Tensor:
        assert isinstance(self._set, Simplex)
        return self._set.from_cube(z)[0]

    def fit(self, data: Data) -> None:
        super().fit(data)
        if not isinstance(self._set, Simplex):
            raise ValueError(f"stick_breaking is for the simplex, not for {domain_of(data, self.domain).registered_name}; take inside")
