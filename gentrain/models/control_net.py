"""diffusers' ControlNets as the branch of a pipeline's denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gentrain.models.control import Form
from gentrain.models.families.base import Family


class ControlNet(nn.Module):
    """The ControlNet of a denoiser whose family has one. Controls of one channel are given as three, as pipelines give theirs.

    Raises ValueError when the form is not that of images, or the pipeline's sizes do not suit it.
    """

    def __init__(self, family: Family, network: Any, form: Form):
        super().__init__()
        if len(form.shape) != 3:
            raise ValueError("a pipeline's network takes controls that are images, such as down_sampling or soft_edges")
        self.channels = 3 if form.shape[0] == 1 else form.shape[0]
        if self.channels != 3 and family.control_is != "image":
            raise ValueError(f"the ControlNet of a {family.pipelines[0]} takes controls of 1 or 3 channels, not of {self.channels}")
        self.family, self.net = family, family.control_branch(network, self.channels)
        self._vae: list[nn.Module] = []  # not among its modules: it never learns, and no checkpoint holds it

    def begin(self, network: Any) -> None:
        """Becomes a copy of the denoiser's first part, whose weights have been given to it since."""
        for name in self.family.control_copies:
            copy = getattr(self.net, name, None)
            if copy is not None:
                own = copy.state_dict()
                copy.load_state_dict({key: value for key, value in getattr(network, name).state_dict().items() if key in own})

    def forward(self, control: Tensor, dtype: torch.dtype, **told: Any) -> Any:
        """What the ControlNet of diffusers makes of a control [B, 1 or channels, H, W] in [0, 1] and what it is told beside."""
        control = control.expand(-1, self.channels, -1, -1)
        if self.family.control_is == "latents":
            control = self._latents(control.float())
        elif self.family.control_is == "signed":
            control = 2 * control - 1
        return self.net(controlnet_cond=control.to(dtype), **told, return_dict=False)

    @torch.no_grad()
    def _latents(self, control: Tensor) -> Tensor:
        """The means of the control's latents, as of any image."""
        if isinstance(control, FakeTensor):  # a plan, which reads no weights
            return control.new_empty(len(control), self.family.channels, *(side // self.family.factor for side in control.shape[-2:]))
        if not self._vae:
            self._vae.append(self.family.source.load("vae").eval().requires_grad_(False))
        return self.family.posterior(self._vae[0].to(control.device), 2 * control - 1)[0]
