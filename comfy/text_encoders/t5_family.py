"""Encoders and tokenizers of the T5 family as image and video models use them: one class each, settings as data."""

from __future__ import annotations

import os
from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer, gen_empty_tokens
from comfy.text_encoders.raw_tokenizers import DATA, T5Tokenizer
from comfy.text_encoders.sentencepiece import SentencePieceTokenizer
from comfy.text_encoders.t5 import T5

T5_XXL_CONFIG = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240,
    "num_layers": 24, "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
}  # fmt: skip
UNLIMITED = 99999999


class T5Model(SDClipModel):
    """A T5-like encoder: last layer, no start token, padded with 0.

    attention_mask: mask padding, and give the mask to the caller (as models that attend to text tokens want it).
    """

    def __init__(
        self,
        device: Any = "cpu",
        layer: str = "last",
        layer_idx: int | None = None,
        dtype: torch.dtype | None = None,
        attention_mask: bool = False,
        model_options: dict[str, Any] | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        special_tokens: dict[str, int] | None = None,
        zero_out_masked: bool = False,
    ) -> None:
        super().__init__(
            device=device, layer=layer, layer_idx=layer_idx, dtype=dtype, model_class=T5,
            textmodel_json_config=config or T5_XXL_CONFIG, special_tokens=special_tokens or {"end": 1, "pad": 0},
            enable_attention_masks=attention_mask or zero_out_masked,
            return_attention_masks=attention_mask and not zero_out_masked,
            zero_out_masked=zero_out_masked,
            model_options={"model_name": "t5xxl", **(model_options or {}), **({"model_name": name} if name else {})},
        )  # fmt: skip


class T5XXLModel(T5Model):
    """T5-XXL 1.1."""


class T5TextTokenizer(SDTokenizer):
    """T5's tokenizer: one row of any length, filled up to `min_length`."""

    def __init__(
        self,
        embedding_directory: Any = None,
        tokenizer_data: dict[str, Any] | None = None,
        min_length: int = 77,
        embedding_size: int = 4096,
        embedding_key: str = "t5xxl",
    ) -> None:
        super().__init__(
            os.path.join(DATA, "t5"), tokenizer_class=T5Tokenizer, max_length=UNLIMITED, min_length=min_length,
            pad_with_end=False, pad_to_max_length=False, has_start_token=False, embedding_directory=embedding_directory,
            embedding_size=embedding_size, embedding_key=embedding_key, tokenizer_data=tokenizer_data,
        )  # fmt: skip


class T5XXLTokenizer(T5TextTokenizer):
    """For T5-XXL."""


def t5_tokenizer_with(**settings: Any) -> type[T5TextTokenizer]:
    """`T5TextTokenizer` with other defaults."""

    class Tokenizer(T5TextTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
            super().__init__(embedding_directory, tokenizer_data, **settings)

    return Tokenizer


class _SingleT5Tokenizer(SD1Tokenizer):
    """{name: rows} of one T5."""

    settings: dict[str, Any] = {}
    name = "t5xxl"

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory, tokenizer_data, clip_name=self.name, name=self.name,
            tokenizer=t5_tokenizer_with(**self.settings),
        )  # fmt: skip


class _SingleT5Model(SD1ClipModel):
    """{name: rows} -> features of one T5."""

    settings: dict[str, Any] = {}
    name = "t5xxl"
    model: type[SDClipModel] = T5XXLModel

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options, name=self.name, clip_model=self.model,
            **self.settings,
        )  # fmt: skip


class PixArtTokenizer(_SingleT5Tokenizer):
    """PixArt and Chroma: no padding at all."""

    settings = {"min_length": 1}


class _PixArtT5(T5XXLModel):
    """T5-XXL whose empty prompt is all padding."""

    @staticmethod
    def gen_empty_tokens(special_tokens: dict[str, int], length: int) -> list[int]:
        """Padding only."""
        return gen_empty_tokens({"pad": special_tokens["pad"]}, length)


class PixArtT5XXL(_SingleT5Model):
    """PixArt-Alpha, PixArt-Sigma, Chroma."""

    model = _PixArtT5


class MochiT5Tokenizer(_SingleT5Tokenizer):
    """Mochi: at least 256 tokens."""

    settings = {"min_length": 256}


class MochiT5XXL(_SingleT5Model):
    """Mochi: padding masked, mask returned."""

    settings = {"attention_mask": True}


class LTXVT5Tokenizer(_SingleT5Tokenizer):
    """LTX-Video: at least 128 tokens."""

    settings = {"min_length": 128}


LTXVT5XXL = MochiT5XXL


class CosmosT5Tokenizer(_SingleT5Tokenizer):
    """Cosmos 1: at least 512 tokens."""

    settings = {"min_length": 512, "embedding_size": 1024}


class CosmosT5XXL(_SingleT5Model):
    """Cosmos 1: T5-XXL 1.0, padding set to zero."""

    settings = {
        "zero_out_masked": True,
        "config": {
            "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "num_heads": 128, "d_ff": 65536,
            "num_layers": 24, "is_gated_act": False, "dense_act_fn": "relu",
        },
    }  # fmt: skip


class SAT5Tokenizer(_SingleT5Tokenizer):
    """Stable Audio: at least 128 tokens of T5-base."""

    name = "t5base"
    settings = {"min_length": 128, "embedding_size": 768, "embedding_key": "t5base"}


class SAT5Model(_SingleT5Model):
    """Stable Audio: T5-base, padding set to zero."""

    name = "t5base"
    settings = {
        "zero_out_masked": True,
        "config": {
            "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072,
            "num_layers": 12, "is_gated_act": False, "dense_act_fn": "relu",
        },
    }  # fmt: skip


class UMT5XXLTokenizer(SDTokenizer):
    """umT5's sentence pieces, whose model comes with the weights as `spiece_model`; at least 512 tokens."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            (tokenizer_data or {}).get("spiece_model"), tokenizer_class=SentencePieceTokenizer,
            tokenizer_args={"end": 1, "origin": "a umt5_xxl file made for ComfyUI"}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=4096, embedding_key="umt5xxl",
            has_start_token=False, pad_to_max_length=False, max_length=UNLIMITED, min_length=512, pad_token=0,
            tokenizer_data=tokenizer_data,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The sentence-piece model."""
        return {"spiece_model": self.tokenizer.serialised()}


class WanT5Tokenizer(SD1Tokenizer):
    """Wan: {"umt5xxl": one row of at least 512}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory, tokenizer_data, clip_name="umt5xxl", name="umt5xxl", tokenizer=UMT5XXLTokenizer
        )


class WanT5Model(_SingleT5Model):
    """Wan: umT5-XXL, padding set to zero."""

    name = "umt5xxl"
    settings = {
        "zero_out_masked": True,
        "config": {**T5_XXL_CONFIG, "model_type": "umt5", "vocab_size": 256384},
    }  # fmt: skip


def t5_xxl_detect(state_dict: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
    """What `flux_clip` and `sd3_clip` want to know about T5 weights: their dtype, and scaled fp8 if they are that."""
    out: dict[str, Any] = {}
    key = f"{prefix}encoder.final_layer_norm.weight"
    if key in state_dict:
        out["dtype_t5"] = state_dict[key].dtype
    if f"{prefix}scaled_fp8" in state_dict:
        out["t5xxl_scaled_fp8"] = state_dict[f"{prefix}scaled_fp8"].dtype
    return out
