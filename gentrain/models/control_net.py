"""diffusers' ControlNetModel as the branch of a pipeline's UNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gentrain.models.control import Form
from gentrain.models.families.base import Family

_WIDTHS = (16, 32, 96, 256)  # of the layers that shrink the control to the latents' size, each but the first by 2
_COPIED = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block")


class ControlNet(nn.Module):
    """A ControlNetModel of a UNet2DConditionModel. Controls of one channel are given as three, as pipelines give theirs.

    Raises ValueError when there is none for the family's denoiser, or the form is not that of images.
    """

    def __init__(self, family: Family, unet: Any, form: Form):
        from diffusers import ControlNetModel

        super().__init__()
        if not family.control_net:
            raise ValueError(f"controls are for Stable Diffusion 1, 2 and XL among pipelines, not for a {family.pipelines[0]}")
        if len(form.shape) != 3:
            raise ValueError("a pipeline's network takes controls that are images, such as down_sampling or soft_edges")
        halvings = family.factor.bit_length() - 1
        if halvings >= len(_WIDTHS):
            raise ValueError(f"a ControlNet shrinks its control by at most 8, latents of this pipeline are {family.factor} times smaller")
        channels = 3 if form.shape[0] == 1 else form.shape[0]
        widths = _WIDTHS[: halvings + 1]
        self.net = ControlNetModel.from_unet(
            unet, conditioning_channels=channels, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
        )
        self.channels = channels
        self.pipeline = family.pipelines[0].replace("Pipeline", "ControlNetPipeline")  # of diffusers, that takes it

    def begin(self, unet: Any) -> None:
        """Becomes a copy of the UNet's way down and middle, whose weights have been given to it since."""
        for name in _COPIED:
            copy = getattr(self.net, name, None)
            if copy is not None:
                own = copy.state_dict()
                copy.load_state_dict({key: value for key, value in getattr(unet, name).state_dict().items() if key in own})

    def forward(self, x: Tensor, t: Tensor, controlnet_cond: Tensor, **told: Any) -> Any:
        return self.net(x, t, controlnet_cond=controlnet_cond.to(x.dtype).expand(-1, self.channels, -1, -1), **told)
