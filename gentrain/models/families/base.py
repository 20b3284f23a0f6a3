"""What a family of pretrained pipelines is to the rest of gentrain."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gentrain.config import Component
from gentrain.models.families.laws import law_of
from gentrain.models.families.source import Source
from gentrain.paths.base import Path

if TYPE_CHECKING:
    from gentrain.models.denoiser import Prediction

Texts = dict[str, Tensor]  # what text encoders make of B prompts: each entry [B, ...]


class Family(Component, kind="family"):
    """How the pipelines of one kind become a denoiser, a codec and a path. Methods never learn of it.

    Attributes:
        pipelines: names of diffusers' classes, as model_index.json has them.
        denoiser: the component that learns. network: its class, of diffusers.
        takes_text: its conditions are prompts; else classes, of which `num_classes` tells the number.
        text_components: what turns prompts into conditions; optional_components: what helps them where the pipeline has it.
        guidance_input: what a network that reads the guidance weight is told.
        control_net: diffusers' class of ControlNets for its denoiser; None: there is none.
        control_copies: the parts of the denoiser of which a ControlNet begins as a copy, of lists of blocks the first ones.
        control_is: what its pipelines give it of an image: "image" in [0, 1], "signed" in [-1, 1], or its "latents".
        scales_noise: its pipelines multiply the noise they begin with by their scheduler's init_noise_sigma; others are given the latents,
            which `packing` (code, of `latents` and `pipeline`) brings into the form that they take.
        call_settings: what a pipeline is called with beside, so that it draws at the size it is asked for: code.
        time_embedding: the denoiser's layer that is given what latent consistency models make of a guidance weight; None: it has none.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "transformer"
    network: ClassVar[str]
    takes_text: ClassVar[bool] = True
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    optional_components: ClassVar[tuple[str, ...]] = ()
    time_embedding: ClassVar[str | None] = None
    control_net: ClassVar[str | None] = None
    control_copies: ClassVar[tuple[str, ...]] = ()
    control_is: ClassVar[Literal["image", "signed", "latents"]] = "image"
    scales_noise: ClassVar[bool] = True
    packing: ClassVar[str] = ""
    call_settings: ClassVar[str] = ""

    def __init__(self, source: Source, guidance_input: float = 1.0):
        self.source, self.guidance_input = source, guidance_input
        for component in (self.denoiser, "vae", "scheduler", *(self.text_components if self.takes_text else ())):
            source.component_class(component)
        if (found := source.component_class(self.denoiser).__name__) != self.network:
            raise ValueError(
                f"{source.name} is a {self.pipelines[0]} whose {self.denoiser} is a {found}, not a {self.network}; name another"
            )
        self.config, self.vae_config = source.config(self.denoiser), source.config("vae")
        scale = self.vae_config["scaling_factor"]
        if not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(f"scaling_factor in {source.name}/vae/config.json is {scale!r}, no positive number; mend it")
        if self.channels != self.denoiser_channels:
            raise ValueError(
                f"the autoencoder in {source.name} makes latents of {self.channels} channels, its {self.denoiser} takes "
                f"{self.denoiser_channels}; they are parts of two pipelines"
            )
        given, taken = self.widths() if self.takes_text else (0, 0)
        if given != taken:
            raise ValueError(
                f"the text encoders in {source.name} make texts {given} wide, its {self.denoiser} takes {taken}; they are parts of two "
                "pipelines"
            )

    def law(self) -> tuple[Path, Prediction]:
        """What the pipeline's scheduler means."""
        return law_of(self.source.component_class("scheduler"), self.source.read("scheduler/scheduler_config.json"))

    def prepare(self, network: nn.Module) -> None:
        """Mends what the denoiser would do in training beside what methods ask of it."""

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The denoiser's own output [B, C, H, W] for latents x [B, C, H, W].

        Args:
            t: [B] float, diffusers' timestep.
            condition: texts of every row, or {"label": [B] int64, num_classes = null}; "guidance" [B, width] for `time_embedding` where
                the network reads one and is told it; "control", what `steering` gave.
        """
        raise NotImplementedError

    @property
    def guidance_told(self) -> float:
        """The guidance_scale with which its pipelines draw without guidance: what a network that reads one was told in training."""
        return self.guidance_input if self.config.get("guidance_embeds") else 1.0

    @property
    def control_pipeline(self) -> str:
        """The class of diffusers that takes its ControlNet."""
        return self.pipelines[0].replace("Pipeline", "ControlNetPipeline")

    def control_branch(self, network: Any, channels: int) -> nn.Module:
        """A `control_net` for the denoiser, of random weights. Raises ValueError where it would not fit.

        channels: of the control.
        """
        raise NotImplementedError

    def _control_branch(self, network: Any, **more: Any) -> nn.Module:
        """The `control_net` of a transformer's sizes, but for those given."""
        import diffusers

        cls = getattr(diffusers, str(self.control_net))
        known = inspect.signature(cls.__init__).parameters
        branch: nn.Module = cls(**{key: value for key, value in network.config.items() if key in known} | more)
        return branch

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        """What a ControlNet makes of the control [B, channels, 8 H, 8 W], as further arguments of the denoiser; where it takes one."""
        raise NotImplementedError

    # --- latents ---

    def check_shape(self, height: int, width: int) -> None:
        """Raises ValueError unless the denoiser takes latents of these sides, in places of a latent, whatever size it was made for."""

    @property
    def factor(self) -> int:
        """Pixels of the image along a side of a latent."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def grain(self) -> int:
        """What the image's sides are multiples of, in pixels."""
        return self.factor

    @property
    def channels(self) -> int:
        """Of a latent."""
        return int(self.vae_config["latent_channels"])

    @property
    def denoiser_channels(self) -> int:
        """Of the latents that the denoiser takes."""
        return int(self.config["in_channels"])

    @property
    def latents_are(self) -> dict[str, Any]:
        """What tells the latents of one autoencoder from those of another."""
        return {key: self.vae_config.get(key) for key in ("latent_channels", "scaling_factor", "shift_factor")}

    def posterior(self, vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] -> mean and deviation of their latents, scaled to about unit variance."""
        posterior, scale = vae.encode(images).latent_dist, self.vae_config["scaling_factor"]  # type: ignore[operator]
        return (posterior.mean - (self.vae_config.get("shift_factor") or 0.0)) * scale, posterior.std * scale

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Latents -> images, about in [-1, 1]."""
        latents = latents / self.vae_config["scaling_factor"] + (self.vae_config.get("shift_factor") or 0.0)
        images: Tensor = vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return images

    # --- prompts ---

    def text_pipeline(self) -> Any:
        """The pipeline with what turns prompts into conditions, and nothing else."""
        present = {key for key, value in self.source.index.items() if isinstance(value, list) and value[0]}
        others = present - {*self.text_components, *self.optional_components}
        return self.source.pipeline(**dict.fromkeys(others))

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        """What the text encoders of `text_pipeline` make of the prompts, as its own `encode_prompt` does."""
        raise NotImplementedError

    def null(self, pipeline: Any, prompt: str, device: torch.device) -> Texts:
        """Of one row without condition, for which `prompt` stands."""
        return self.texts(pipeline, [prompt], device)

    def widths(self) -> tuple[int, int]:
        """Of a token of text: what the text encoders give, and what the denoiser takes."""
        raise NotImplementedError

    def text_shapes(self) -> Texts:
        """`texts` of one prompt as tensors without numbers (on the meta device): what the configurations say of them."""
        raise NotImplementedError

    def _tokens(self, encoder: str) -> int:
        """Of a prompt, as a CLIP text encoder takes them."""
        return int(self.source.read(f"{encoder}/config.json")["max_position_embeddings"])

    # --- classes ---

    @property
    def num_classes(self) -> int:
        raise NotImplementedError


def family_of(source: Source, guidance_input: float = 1.0) -> Family:
    """The family of the pipeline. Raises ValueError when there is none."""
    name = source.index["_class_name"]
    for family in Family.available().values():
        if name in family.pipelines:
            try:
                found = family(source, guidance_input)
                _ = found.law(), found.grain
            except ValueError:
                raise
            except Exception as error:  # of values that no library checks: anything may come of them
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                raise ValueError(f"the pipeline in {source.name} has a damaged configuration ({what}); download it anew") from error
            return found
    known = ", ".join(pipeline for family in Family.available().values() for pipeline in family.pipelines)
    raise ValueError(f"{source.name} is a {name}, a pipeline of no family that is known here; known: {known}")
