"""Pretrained models of transformers that read images or texts: their files, what they want to be given, and what they make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gentrain.config import option
from gentrain.models.hub import fetched, files_of
from gentrain.models.text import minilm_directory

PREPROCESSING = "preprocessor_config.json"
MINILM = "minilm"  # stands for the directory of the packaged text encoder

# model_type in config.json -> the class of transformers that is its side for images, or for texts
_IMAGE_SIDES = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
_TEXT_SIDES = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}
_OWN_SIDES = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}


@dataclass
class FromPretrained:
    """A part of a configuration that names such a model."""

    directory: str = option(help="a directory that save_pretrained of the model and of its processor wrote, or a repository on the hub")
    revision: str | None = option(None, "branch, tag or commit of the repository; null = main")

    def __post_init__(self) -> None:
        if Path(self.directory).is_dir():
            self.directory = str(Path(self.directory).absolute())


def local_file(directory: str, revision: str | None, name: str) -> Path:
    """A file of a directory or of a repository on the hub. Raises ValueError where it is not there."""
    if Path(directory).is_dir():
        path = Path(directory, name)
    else:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = fetched(directory, revision, (name,)) / name
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            why = f"and {name} of that repository cannot be had ({type(error).__name__})"
            raise ValueError(f"{directory} is no directory, {why}; download it first") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a directory that save_pretrained of the model and of its processor wrote")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file holds no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); download it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; download it anew")
    return content


def resize(images: Tensor, side: int) -> Tensor:
    """[B, C, H, W] -> [B, C, side, side]: bicubic with antialiasing, the shorter side to `side`, then the middle. Differentiable."""
    height, width = images.shape[2:]
    scaled = [max(side, round(length * side / min(height, width))) for length in (height, width)]
    if (height, width) != tuple(scaled):
        images = interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((length - side) // 2 for length in scaled)
    return images[:, :, top : top + side, left : left + side]


class Preprocessing(NamedTuple):
    """What a model wants of images: side in pixels; mean and standard deviation of three channels of pixels in [0, 1]."""

    side: int
    mean: list[float]
    std: list[float]

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] in [-1, 1] -> [B, 3, side, side] as the model wants them. Differentiable."""
        x = resize((images.float().clamp(-1, 1) + 1) / 2, self.side).clamp(0, 1).expand(-1, 3, -1, -1)
        return (x - x.new_tensor(self.mean).reshape(3, 1, 1)) / x.new_tensor(self.std).reshape(3, 1, 1)


def read_preprocessing(directory: str, revision: str | None) -> Preprocessing:
    """Raises ValueError when the directory's file does not tell."""
    path = local_file(directory, revision, PREPROCESSING)
    settings = read_json(path)
    size = settings.get("crop_size") or settings.get("size") or {}
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not isinstance(side, int) or not isinstance(mean, list) or not isinstance(std, list) or len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{path} lacks the size of images, image_mean or image_std; download it anew")
    return Preprocessing(side, mean, std)


@dataclass(frozen=True)
class Side:
    """One side, images or texts, of a pretrained model: a directory that save_pretrained wrote, or a repository on the hub.

    Of a CLIP or a SigLIP it is that side alone, projection included. Of others: the first token of the last layer for images, the mean over
    the tokens of the last layer for texts.
    """

    directory: str
    revision: str | None
    reads: str  # "images" or "texts"

    @cached_property
    def path(self) -> str:
        return str(minilm_directory()) if self.directory == MINILM else self.directory

    @cached_property
    def kind(self) -> str:
        """model_type. Raises ValueError where there is none."""
        kind = read_json(local_file(self.path, self.revision, "config.json")).get("model_type")
        if not isinstance(kind, str):
            raise ValueError(f"{self.path} holds no model of transformers; its config.json has no model_type")
        return kind

    @cached_property
    def config(self) -> Any:
        """Of the side. Raises ValueError when transformers does not know the model or it has no such side."""
        import transformers

        try:
            with_both = _OWN_SIDES.get(self.kind)
            if with_both:
                config_class = getattr(transformers, with_both)
                whole = config_class.from_pretrained(self.path, revision=self.revision, local_files_only=True)
                side = whole.vision_config if self.reads == "images" else whole.text_config
                if self.kind == "clip":
                    side.projection_dim = whole.projection_dim  # a side's own may be another, of which the whole model takes no notice
                return side
            config = transformers.AutoConfig.from_pretrained(self.path, revision=self.revision, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the model in {self.path} cannot be read ({str(error).splitlines()[0]})") from error
        wanted = "image_size" if self.reads == "images" else "vocab_size"
        if not hasattr(config, wanted) or not hasattr(config, "hidden_size"):
            raise ValueError(f"{self.path} holds a {self.kind}, which does not read {self.reads}; {self._remedy}")
        return config

    @property
    def _remedy(self) -> str:
        return "name a CLIP, a SigLIP, or a " + ("vision transformer" if self.reads == "images" else "text encoder such as BERT")

    @cached_property
    def width(self) -> int:
        """Entries of what it makes of an image or a text."""
        if self.kind == "siglip" and self.reads == "texts":
            return int(self.config.projection_size)
        return int(self.config.projection_dim if self.kind == "clip" else self.config.hidden_size)

    def tower(self) -> PretrainedImageTower | PretrainedTextTower:
        """With its weights; without, on the meta device. Raises ValueError when they cannot be read."""
        import transformers

        sides = _IMAGE_SIDES if self.reads == "images" else _TEXT_SIDES
        of = getattr(transformers, sides.get(self.kind, "AutoModel"))
        if torch.get_default_device().type == "meta":
            network = of(self.config) if self.kind in sides else of.from_config(self.config)
        else:
            try:
                if not Path(self.path).is_dir():
                    fetched(self.path, self.revision, *files_of())
                with _quiet():  # the other side's weights are told as unexpected
                    network, found = of.from_pretrained(
                        self.path, config=self.config, revision=self.revision, local_files_only=True, dtype=torch.float32,
                        use_safetensors=True, output_loading_info=True,
                    )  # fmt: skip
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"the model in {self.path} cannot be loaded ({str(error).splitlines()[0]}); download it anew") from error
            if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):  # which nothing here asks
                raise ValueError(f"the weights in {self.path} lack {missing[0]}, which would be random; download it anew")
        if self.reads == "images":
            return PretrainedImageTower(network, read_preprocessing(self.path, self.revision))
        return PretrainedTextTower(network, self.kind)

    def tokens(self, texts: list[str]) -> Tensor:
        """[texts, L] int64: numbers of tokens + 1, and 0 where a shorter text is filled up. Raises ValueError without a tokenizer."""
        import transformers

        try:
            if not Path(self.path).is_dir():
                fetched(self.path, self.revision, *files_of())
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, revision=self.revision, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.path} has no tokenizer ({str(error).splitlines()[0]}); save it there too") from error
        longest = int(self.config.max_position_embeddings)
        # SigLIP was trained on texts filled up to the full length, without a mask
        filled = "max_length" if self.kind == "siglip" else "longest"
        found = tokenizer(texts, padding=filled, truncation=True, max_length=longest, return_tensors="pt")
        ids: Tensor = found["input_ids"] + 1
        return ids if self.kind == "siglip" else ids * found["attention_mask"]


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class PretrainedImageTower(nn.Module):
    """x [B, 1 or 3, H, W] in [-1, 1] -> [B, width]."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(pixel_values=self.preprocessing(x).to(next(self.network.parameters()).dtype))
        if (embedded := getattr(output, "image_embeds", None)) is not None:  # CLIP
            return embedded
        if type(self.network).__name__ == _IMAGE_SIDES["siglip"]:
            return output.pooler_output
        return output.last_hidden_state[:, 0]


class PretrainedTextTower(nn.Module):
    """tokens [B, L] as `Side.tokens` gives them -> [B, width]."""

    def __init__(self, network: nn.Module, kind: str):
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens > 0
        ids = (tokens - 1).clamp(min=0)
        if self.kind == "siglip":
            return self.network(input_ids=ids).pooler_output
        output = self.network(input_ids=ids, attention_mask=mask.long())
        if self.kind == "clip":
            return output.text_embeds
        states = output.last_hidden_state
        share = mask.to(states.dtype).unsqueeze(2)
        return (states * share).sum(1) / share.sum(1).clamp(min=1)
