"""DiT, class-conditional (arXiv:2212.09748)."""

from __future__ import annotations

from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.families.base import Family


@register("dit")
class DiT(Family):
    """DiTTransformer2DModel on 4 channels of latents; of its 8 output channels the last 4, the learned variance, are left aside."""

    pipelines = ("DiTPipeline",)
    network = "DiTTransformer2DModel"
    takes_text = False

    @property
    def num_classes(self) -> int:
        return int(self.config["num_embeds_ada_norm"])

    def prepare(self, network: nn.Module) -> None:
        for block in network.transformer_blocks:  # type: ignore[union-attr]
            # methods drop labels, from the noise of each sample; the model's own dropping would draw from torch's generator
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def check_shape(self, height: int, width: int) -> None:
        if height != width:
            raise ValueError("DiTTransformer2DModel is for square images; leave out `buckets`")

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output: Tensor = network(x, t, class_labels=condition["label"], return_dict=False)[0]
        return output[:, : x.shape[1]]
