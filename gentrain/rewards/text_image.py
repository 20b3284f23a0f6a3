"""Rewards that compare image and text by a pretrained model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gentrain.config import option, register
from gentrain.data.base import Data
from gentrain.models.hub import fetched, files_of
from gentrain.models.image_text import PREPROCESSING, FromPretrained, local_file, read_json, read_preprocessing
from gentrain.rewards.base import Asked, Networks, Reward, Texts, check_images

_TOWERS = ("clip", "siglip")  # model_type in config.json
_HEAD = "reward_head.safetensors"


class _Pretrained:
    """A model, its tokenizer, and what its images are: held frozen in float32 on one device."""

    def __init__(self, directory: str, revision: str | None, model_class: str, device: torch.device):
        import transformers

        self.images = read_preprocessing(directory, revision)
        try:
            if not Path(directory).is_dir():
                fetched(directory, revision, *files_of())
            where: dict[str, Any] = {"revision": revision, "local_files_only": True}
            with torch.device("cpu"):
                self.model: Any = getattr(transformers, model_class).from_pretrained(
                    directory, dtype=torch.float32, use_safetensors=True, **where
                )
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **where)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"the model in {directory} cannot be loaded ({str(error).splitlines()[0]}); download it anew") from error
        self.model.to(device).eval().requires_grad_(False)
        self.device = device

    def tokens(self, texts: list[str], length: int) -> dict[str, Tensor]:
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {name: value.to(self.device) for name, value in found.items()}


# The model belongs to the process: several rewards, and every copy of a configuration, share it.
_loaded = cache(_Pretrained)


@dataclass
class _OfDirectory(FromPretrained, Reward):
    licence: ClassVar[str] = "that of the weights; see their model card"
    kinds: ClassVar[tuple[str, ...]] = _TOWERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.directory).is_dir():
            kind = read_json(local_file(self.directory, None, "config.json")).get("model_type")
            if kind not in self.kinds:
                raise ValueError(
                    f"{self.directory} holds a model of the type {kind!r}; {self.registered_name} reads {', '.join(self.kinds)}"
                )

    def check_data(self, data: Data) -> None:
        check_images(data)


@dataclass
class _TextImage(_OfDirectory):
    template: str = option("{}", "{} is the caption, or the name of the class")

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        self.texts = Texts(data, self.template)


@register("text_image")
@dataclass
class TextImageSimilarity(_TextImage):
    """Cosine between image and text in a model of CLIP's or SigLIP's kind, without its logit scale.

    PickScore (arXiv:2305.01569) and HPS v2 (arXiv:2306.09341), stored as transformers' CLIPModel, are such models. The text's side has no
    gradient; images are resized to the model's size by bicubic interpolation, so that a gradient reaches them.
    """

    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    needs: ClassVar[str] = f"a CLIPModel or SiglipModel of transformers with its tokenizer and {PREPROCESSING}"

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        pretrained = _loaded(self.directory, self.revision, "AutoModel", images.device)
        texts, rows = self.texts(asked)
        with torch.no_grad():
            length = pretrained.model.config.text_config.max_position_embeddings
            text = pretrained.model.get_text_features(**pretrained.tokens(texts, length)).pooler_output
        image = pretrained.model.get_image_features(pixel_values=pretrained.images(images)).pooler_output
        return cosine_similarity(image, text[rows], dim=1)


@register("image_reward")
@dataclass
class ImageReward(_TextImage):
    """ImageReward (arXiv:2304.05977): a BLIP that reads text and image together, with a head of linear layers, normalised.

    directory holds a BlipForImageTextRetrieval of transformers (whose own heads are not used) and reward_head.safetensors, the linear
    layers in order: "<n>.weight" and "<n>.bias", n = 0, 1, ...
    """

    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    kinds: ClassVar[tuple[str, ...]] = ("blip",)
    needs: ClassVar[str] = f"a BlipForImageTextRetrieval of transformers with its tokenizer, {PREPROCESSING} and {_HEAD}"

    mean: float = option(0.16717530, "of the head's output over the paper's data: subtracted", source="arXiv:2304.05977, code release")
    std: float = option(1.0333394, "of the same: divided by", source="arXiv:2304.05977, code release")
    saturate: float | None = option(2.0, "reward r becomes min(r - this, 0); null = r itself", source="ReFL, arXiv:2304.05977, eq. 3")
    words: PositiveInt = option(35, "tokens of a text", source="arXiv:2304.05977, code release")

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        pretrained = _loaded(self.directory, self.revision, "BlipForImageTextRetrieval", images.device)
        head = _head(self.directory, self.revision, images.device)
        texts, rows = self.texts(asked)
        tokens = {name: value[rows] for name, value in pretrained.tokens(texts, self.words).items()}
        seen = pretrained.model.vision_model(pixel_values=pretrained.images(images)).last_hidden_state
        read = pretrained.model.text_encoder(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.int64, device=seen.device),
        ).last_hidden_state  # fmt: skip
        value = (head(read[:, 0]).squeeze(1) - self.mean) / self.std
        return value if self.saturate is None else (value - self.saturate).clamp(max=0)


@cache
def _head(directory: str, revision: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The linear layers of a head, nothing between them (dropout is for training). Raises ValueError when the file holds no such layers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = local_file(directory, revision, _HEAD)
    try:
        state = load_file(path)
        layers = [nn.Linear(*state[f"{n}.weight"].shape[::-1]) for n in range(len(state) // 2)]
        head = nn.Sequential(*layers)
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no head ({str(error).splitlines()[0]}); it needs <n>.weight and <n>.bias, n = 0, 1, ...") from error
    return head.to(device).eval().requires_grad_(False)


@register("aesthetic")
@dataclass
class Aesthetic(_OfDirectory):
    """A head of linear layers on the normalised image embedding of a CLIP, such as LAION's aesthetic predictor; texts are not read.

    directory holds a CLIPModel of transformers and reward_head.safetensors, as for `image_reward`.
    """

    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    needs: ClassVar[str] = f"a CLIPModel of transformers with its tokenizer, {PREPROCESSING} and {_HEAD}"

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        pretrained = _loaded(self.directory, self.revision, "AutoModel", images.device)
        embedding = pretrained.model.get_image_features(pixel_values=pretrained.images(images)).pooler_output
        return _head(self.directory, self.revision, images.device)(nn.functional.normalize(embedding, dim=1)).squeeze(1)
