"""A model as it is: a run that trains nothing, so that whatever reads runs can draw from a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from gentrain.config import register
from gentrain.methods.base import Clock, Frozen, Method, Role, Update


@register("as_is")
@dataclass
class AsIs(Method):
    """Trains nothing. The stage `adopt` writes its runs."""

    roles: ClassVar[dict[str, Role]] = {"model": Frozen(given=True)}
    generator: ClassVar[str | None] = "model"

    @property
    def reads_data(self) -> bool:
        return False

    def updates(self, clock: Clock) -> Iterator[Update]:
        raise ValueError("as_is trains nothing; draw from a run of it that the stage `adopt` has written")
