"""The text encoder of Stable Diffusion 2: OpenCLIP ViT-H."""

from __future__ import annotations

from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer

CLIP_H_CONFIG = {
    "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
    "hidden_act": "gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "vocab_size": 49408,
}  # fmt: skip


class SD2ClipHModel(SDClipModel):
    """The last but one of 24 layers, with the final norm; padded with 0. Files of diffusers end with that layer."""

    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config = {**CLIP_H_CONFIG, **(model_options or {}).get("clip_h_model_config", {})}
        used = -1 if config["num_hidden_layers"] == 23 else -2
        super().__init__(
            device=device, dtype=dtype, layer="hidden", layer_idx=used, textmodel_json_config=CLIP_H_CONFIG,
            special_tokens={"start": 49406, "end": 49407, "pad": 0}, return_projected_pooled=True,
            model_options={**(model_options or {}), "model_name": "clip_h"},
        )  # fmt: skip


class SD2ClipHTokenizer(SDTokenizer):
    """CLIP's tokenizer padded with 0."""

    def __init__(self, tokenizer_path: Any = None, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            tokenizer_path, pad_with_end=False, embedding_directory=embedding_directory, embedding_size=1024,
            embedding_key="clip_h", tokenizer_data=tokenizer_data,
        )  # fmt: skip


class SD2Tokenizer(SD1Tokenizer):
    """{"h": rows}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data, clip_name="h", tokenizer=SD2ClipHTokenizer)


class SD2ClipModel(SD1ClipModel):
    """{"h": rows} -> features."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, clip_name="h", clip_model=SD2ClipHModel, model_options=model_options
        )
