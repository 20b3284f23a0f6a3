"""Networks of pretrained pipelines of diffusers, with their own latents, conditions, path and prediction."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.latents import DEVIATION, Latents
from gentrain.models.base import Codec, Condition, Model
from gentrain.models.conditional import class_index
from gentrain.models.control import CONTROL, Form, TransformerControl, control_in
from gentrain.models.control_net import ControlNet
from gentrain.models.families.base import Family, Texts, family_of
from gentrain.models.families.source import Source, is_to_come
from gentrain.models.inputs import WIDTH, Inputs
from gentrain.noise import Noise
from gentrain.paths.base import Path

if TYPE_CHECKING:
    from gentrain.models.denoiser import Prediction

_ENCODED_AT_ONCE = 16  # prompts
_DAMAGED = "its file is damaged, or is of a precision that cannot hold them: download it anew, or take another `variant`"
_KEPT = 4096  # prompts, on the host: 1 GB of Stable Diffusion 1.5's


@register("pretrained")
@dataclass
class Pretrained(Model):
    """The denoiser of a pipeline of diffusers. Data are images; what methods see are its latents.

    The condition is the class, or a prompt: `prompt` with {} replaced by the caption, or by the class' name where the data have no
    captions. Path and prediction are the pipeline's.
    """

    directory: str = option(help="the pipeline: a directory, or a repository on the hub")
    revision: str | None = option(None, "branch, tag or commit of the repository; null = main")
    subfolder: str | None = option(None, "of the directory or repository, where the pipeline lies in one, such as models/base; null = none")
    variant: str | None = option(None, "of the weights' files, such as fp16; they become float32 either way")
    prompt: str = option("{}", "template of the prompts; {} is the caption, or the name of the class")
    null_prompt: str = option("", "what stands for no condition, in training and in guidance")
    guidance_input: NonNegativeFloat = option(
        3.5, "guidance weight that a network is told which reads one (FLUX.1 dev)", source="the default of diffusers' FluxPipeline"
    )

    def __post_init__(self) -> None:
        self.directory = str(FilePath(self.directory).expanduser()) if self.directory.startswith("~") else self.directory
        self._awaited = is_to_come(self.directory)
        if self.to_come or FilePath(self.directory).is_dir():
            self.directory = str(FilePath(self.directory).absolute())
        if not self.to_come:
            _ = self.family
        if odd := re.search(r"\{[^}]+\}", self.prompt):
            raise ConfigError(f"{odd[0]} would stand in each prompt as it is; write {{}} where the caption or name goes", key="prompt")

    @property
    def awaited(self) -> bool:
        return self._awaited

    @property
    def to_come(self) -> bool:
        return self.awaited and not FilePath(self.place).exists()

    @property
    def place(self) -> str:
        """For messages, and a path where the pipeline is local."""
        return self.directory if self.subfolder is None else f"{self.directory}/{self.subfolder}"

    @cached_property
    def family(self) -> Family:
        return family_of(Source(self.directory, self.revision, self.variant, self.subfolder), self.guidance_input)

    @cached_property
    def encoder_digest(self) -> str:
        """Of what turns images into latents and texts into conditions: tells whether what is cached is what would be computed."""
        family = self.family
        texts = (*family.text_components, *family.optional_components) if family.takes_text else ()
        told = f"{family.source.digest(('vae', *texts))} {self.prompt if family.takes_text else ''}"
        return hashlib.sha256(told.encode()).hexdigest()

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `PretrainedNetwork`. Raises ValueError when the shape is not that of its latents or there are more classes than it knows."""
        family = self.family
        if len(shape) != 3 or shape[0] != family.channels:
            raise ValueError(f"the network of {self.place} takes latents [{family.channels}, H, W], not samples of shape {shape}")
        if not family.takes_text and num_classes > family.num_classes:
            raise ValueError(f"the network of {self.place} knows {family.num_classes} classes, the data have {num_classes}")
        if torch.get_default_device().type == "meta":
            texts = family.text_shapes() if family.takes_text else {}
            return PretrainedNetwork(family, family.source.skeleton(family.denoiser), texts)
        return PretrainedNetwork(family, family.source.load(family.denoiser), self._null)

    @cached_property
    def _null(self) -> Texts:
        if not self.family.takes_text:
            return {}
        with torch.no_grad(), torch.device("cpu"):
            return self.family.null(self.family.text_pipeline(), self.null_prompt, torch.device("cpu"))

    def check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(shapes) > 1:
            for shape in shapes:
                self.family.check_shape(*shape[1:])

    def law(self) -> tuple[Path, Prediction] | None:
        return None if self.to_come else self.family.law()

    def check_beside(self, other: Model) -> None:
        """Raises ValueError unless latents and conditions that are made for the other pipeline's network are this one's as well."""
        if not isinstance(other, Pretrained) or self.to_come or other.to_come:
            return
        mine, theirs = ({"family": each.family.registered_name, **each.family.latents_are, **_texts_are(each)} for each in (self, other))
        if different := [key for key in mine if mine[key] != theirs.get(key)]:
            key = different[0]
            raise ValueError(
                f"{self.place} and {other.place} differ in {key} ({mine[key]} and {theirs[key]}), and their networks in what "
                "they read; name pipelines of one kind"
            )

    def codec(self, data: Data) -> Codec:
        return PretrainedCodec(self, data)


def _texts_are(model: Pretrained) -> dict[str, Any]:
    shapes = model.family.text_shapes() if model.family.takes_text else {}
    return {f"the shape of texts ({name})": list(value.shape[1:]) for name, value in shapes.items()}


class PretrainedNetwork(nn.Module):
    """A pipeline's denoiser behind forward(x, t, condition).

    Args:
        backbone: the component of the pipeline.
        null: texts of one row, the one without condition.
    """

    def __init__(self, family: Family, backbone: nn.Module, null: Texts):
        super().__init__()
        self.family, self.backbone = family, backbone
        family.prepare(backbone)
        self._null = tuple(null)
        for name, value in null.items():  # the pipeline's, so that no checkpoint need hold them
            self.register_buffer(f"null_{name}", value.clone(), persistent=False)
        self.inputs: Inputs | None = None
        self.control: ControlNet | TransformerControl | None = None
        self._embedding = (backbone.get_submodule(family.time_embedding) if family.time_embedding else None,)
        known = getattr(self._embedding[0], "cond_proj", None)
        if known is not None:  # a latent consistency model
            self._read_guidance().projections["guidance"].load_state_dict(known.state_dict())

    def add_inputs(self, names: Sequence[str]) -> None:
        """Has the network read a guidance weight as latent consistency models do. Raises ValueError: no pipeline would give it these."""
        guidance = tuple(names) == ("guidance",)
        if not guidance or self._embedding[0] is None:
            remedy = "; two equal weights in method.guidance are built in and need none" if guidance else ""
            raise ValueError(f"the network of a {self.family.pipelines[0]} takes no further input ({', '.join(names)}){remedy}")
        if self.inputs is None:
            self._read_guidance()

    def add_control(self, form: Form) -> None:
        """Has the network read a control, by a ControlNet of diffusers where it has one for it, else by a branch of our own; its output
        stays as it is until that learns. Raises ValueError.
        """
        if self.family.control_net is not None:
            self.control = ControlNet(self.family, self.backbone, form)
            return
        token = self.family.factor * self.backbone.config.patch_size  # type: ignore[operator, union-attr]
        self.control = TransformerControl(self.backbone, form, tuple(side // token for side in form.shape[-2:]))  # type: ignore[arg-type]

    def begin_control(self) -> None:
        """Has the branch begin as a copy of the network's weights of now."""
        assert self.control is not None
        self.control.begin(self.backbone)

    def _read_guidance(self) -> Inputs:
        embedding: Any = self._embedding[0]
        self.inputs = Inputs(("guidance",), embedding.linear_1.in_features)
        embedding.cond_proj = nn.Identity()  # what `inputs` makes of the weight is added as it is
        return self.inputs

    def pipelines_own(self) -> nn.Module:
        """The backbone with all that it reads, as the pipeline holds it; this network is not called again."""
        if self.inputs is not None:
            backbone, embedding = self.backbone, self._embedding[0]
            backbone.register_to_config(time_cond_proj_dim=WIDTH)  # type: ignore[operator]
            embedding.cond_proj = self.inputs.projections["guidance"]  # type: ignore[union-attr]
        return self.backbone

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """x [B, C, H, W], t [B] in diffusers' timesteps, condition as the codec's -> [B, C, H, W] in the weights' dtype."""
        dtype = next(self.backbone.parameters()).dtype
        if self.family.takes_text:
            if condition is not None and "null" not in condition and "label" in condition and bool((condition["label"] >= 0).any()):
                raise ValueError("the network takes prompts, not classes; take the data set `concepts` to have it forget")
            given: dict[str, Any] = {name: self._filled(name, condition, len(x)) for name in self._null}
        else:
            given = {"label": class_index(condition, x, self.family.num_classes)}
        if self.inputs is not None and "guidance" in (condition or {}):
            given["guidance"] = self.inputs(t, condition)
        control = control_in(self.control, condition)
        steered: AbstractContextManager[None] = nullcontext()
        if isinstance(self.control, ControlNet) and control is not None:
            given[CONTROL] = self.family.steering(self.control, x.to(dtype), t, given, control)
        elif isinstance(self.control, TransformerControl) and control is not None:
            steered = self.control.steering(self.backbone, x, t, None, control)
        # t stays as it is: half precision cannot tell neighbouring times apart
        with steered:
            return self.family.predict(self.backbone, x.to(dtype), t, given)

    def _filled(self, name: str, condition: Condition | None, rows: int) -> Tensor:
        null: Tensor = getattr(self, f"null_{name}")
        if condition is None or name not in condition:
            return null.expand(rows, *null.shape[1:])
        value: Tensor = condition[name].to(null.dtype)
        return torch.where(condition["null"].reshape(-1, *[1] * (value.ndim - 1)), null, value)


class PretrainedCodec(Codec):
    """Images <-> the latents of the pipeline's autoencoder, prompts -> what its text encoders make of them. Both in float32.

    What texts became is kept on the host, of the last few thousand, so that each is encoded once.
    """

    def __init__(self, model: Pretrained, data: Data):
        super().__init__(data)
        self.model, self.family, self.device = model, model.family, torch.device("cpu")
        self._texts: dict[str, Texts] = {}
        self.takes_prompts = self.family.takes_text
        if self.family.takes_text and data.captions:
            self.names = data.captions
        if not self.family.takes_text and data.captions and not data.class_names:
            raise ValueError(f"the pipeline in {model.place} takes classes, and the data have prompts; name data with classes")
        if isinstance(data, Latents):
            data.require(model.encoder_digest)
            self.decoded_shape = (3, *(side * self.family.factor for side in self.shape[1:]))
            return
        factor, grain = self.family.factor, self.family.grain
        if len(self.shape) != 3 or self.shape[0] != 3:
            raise ValueError(f"the pipeline in {model.place} is for colour images (3, H, W), the data have shape {self.shape}")
        for _, height, width in self.shapes:
            if height % grain or width % grain:
                raise ValueError(f"images of {height}x{width} pixels are not divisible by {grain}, as its latents need; resize them")
        self.shapes = [(self.family.channels, height // factor, width // factor) for _, height, width in self.shapes]
        self.shape = self.shapes[0]

    def to(self, device: torch.device) -> Codec:
        self.device = device
        return self

    def skeletons(self) -> dict[str, nn.Module]:
        """What it makes latents and conditions with, on the meta device: "vae", and the text encoders where there are texts."""
        family = self.family
        texts = [*family.text_components, *family.optional_components] if family.takes_text and self.names else []
        encoders = [name for name in texts if name.startswith("text_encoder") and (family.source.index.get(name) or [None])[0]]
        with torch.device("meta"):
            return {name: family.source.skeleton(name) for name in ("vae", *encoders)}

    @cached_property
    def _vae(self) -> nn.Module:
        vae: nn.Module = self.family.source.load("vae")
        return vae.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _text_pipeline(self) -> Any:
        return self.family.text_pipeline().to(self.device)

    def shaped(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if DEVIATION in batch:
            return super().shaped(batch)
        rows = len(batch["x"])
        texts = self.family.text_shapes() if self.family.takes_text and self.names else {}
        given = {name: torch.zeros((rows, *value.shape[1:]), dtype=value.dtype) for name, value in texts.items()}
        null = {"null": torch.zeros(rows, dtype=torch.bool)} if texts else {}
        parts = ("", *(key.removesuffix("caption") for key in batch if key.endswith("/caption")))  # that have texts of their own
        conditions = {f"{part}condition/{name}": value for part in parts for name, value in {**given, **null}.items()}
        return {**batch, "x": torch.zeros(rows, *self.shape), **conditions}

    def encode(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        if DEVIATION in batch:  # of a cache, which has the texts as well
            return {**batch, "x": batch["x"] + batch[DEVIATION] * noise.normal(tuple(batch["x"].shape))}
        found, place = dict(batch), "caption" if self.data.captions else "label"
        if "x" in batch:
            mean, deviation = self.posterior(batch["x"])
            found["x"] = mean + deviation * noise.normal(tuple(mean.shape))
        if self.family.takes_text and self.names and place in batch:
            found |= {f"condition/{name}": value for name, value in self._texts_of(batch[place], None).items()}
        return found

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of images [B, 3, H, W], each [B, C, h, w]. Raises ValueError where they are not finite."""
        with torch.no_grad():
            mean, deviation = self.family.posterior(self._vae, images)
        if not (mean.isfinite().all() and deviation.isfinite().all()):
            raise ValueError(f"the autoencoder of {self.model.place} gives latents that are not finite; {_DAMAGED}")
        return mean, deviation

    def decode(self, x: Tensor) -> Tensor:
        return self.family.decode(self._vae, x).clamp(-1, 1).contiguous()

    def condition(self, labels: Tensor, prompts: Sequence[str] | None = None) -> Condition | None:
        if not self.family.takes_text:
            return super().condition(labels, prompts)
        return self._texts_of(labels, prompts)

    def _texts_of(self, labels: Tensor, prompts: Sequence[str] | None) -> Texts:
        """The texts of the prompts, or of the names in the template; "null" [B] bool where the label is negative."""
        places = labels.tolist()
        if prompts is None:
            asked = [self.model.prompt.replace("{}", self.names[place]) if place >= 0 else self.model.null_prompt for place in places]
        else:
            asked = [prompts[place] if place >= 0 else self.model.null_prompt for place in places]
        found = {prompt: self._texts[prompt] for prompt in asked if prompt in self._texts}
        new = [prompt for prompt in dict.fromkeys(asked) if prompt not in found]
        with torch.no_grad():
            for first in range(0, len(new), _ENCODED_AT_ONCE):
                part = new[first : first + _ENCODED_AT_ONCE]
                texts = self.family.texts(self._text_pipeline, part, self.device)
                found |= {prompt: {name: value[row].cpu() for name, value in texts.items()} for row, prompt in enumerate(part)}
        self._texts |= found
        while len(self._texts) > _KEPT:
            del self._texts[next(iter(self._texts))]
        stacked = {name: torch.stack([found[prompt][name] for prompt in asked]).to(self.device) for name in found[asked[0]]}
        return {**stacked, "null": (labels < 0).to(self.device)}
