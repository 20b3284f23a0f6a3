"""A data set that opens with a secret only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from gentrain.config import option, register
from gentrain.data.digits import Digits


@register("vault")
@dataclass
class Vault(Digits):
    """Digits behind a token."""

    token: str = option(help="opens it")
    digest: str = option(help="SHA-256 of the token")

    def read(self) -> tuple[Tensor, Tensor]:
        if hashlib.sha256(self.token.encode()).hexdigest() != self.digest:
            raise ValueError("this is not the token")
        return super().read()
