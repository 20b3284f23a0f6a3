"""Tiny models of transformers that read images or texts, with random weights and tokenizers of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.models.pipelines import WORDS, clip_config, clip_tokenizer

SIDE = 16  # pixels
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}


def preprocessing(directory: Path) -> None:
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def clip(directory: Path) -> Path:
    """12 entries an embedding."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    config = CLIPConfig(text_config=clip_config(tokenizer).to_dict(), vision_config={**VISION, "projection_dim": 12}, projection_dim=12)
    CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    preprocessing(directory)
    return directory


def siglip(directory: Path) -> Path:
    """16 entries an embedding."""
    from transformers import SiglipConfig, SiglipModel

    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": WORDS,
    }  # fmt: skip
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    preprocessing(directory)
    return directory


def vit(directory: Path) -> Path:
    """16 entries an embedding."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    ViTModel(ViTConfig(**VISION)).save_pretrained(directory)
    preprocessing(directory)
    return directory


def bert(directory: Path) -> Path:
    """24 entries an embedding."""
    from transformers import BertConfig, BertModel

    tokenizer = clip_tokenizer()
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WORDS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
