"""The text encoder of Lumina 2: Gemma 2 2B."""

from __future__ import annotations

from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.text_encoders.llama import LanguageModel
from comfy.text_encoders.sentencepiece import SentencePieceTokenizer
from comfy.text_encoders.t5_family import UNLIMITED

GEMMA2_2B_CONFIG = {
    "transformer_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "rms_norm_eps": 1e-6, "rms_norm_add": True, "rope_theta": 10000.0, "mlp_activation": "gelu_pytorch_tanh",
    "qkv_bias": False,
}  # fmt: skip


class Gemma2Tokenizer(SDTokenizer):
    """Gemma's sentence pieces after a start token; the model comes with the weights as `spiece_model`. No padding."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            (tokenizer_data or {}).get("spiece_model"), tokenizer_class=SentencePieceTokenizer,
            tokenizer_args={"start": 2, "origin": "a gemma_2_2b file made for ComfyUI"}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=2304, embedding_key="gemma2_2b",
            has_end_token=False, pad_to_max_length=False, max_length=UNLIMITED, min_length=1,
            tokenizer_data=tokenizer_data,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The sentence-piece model."""
        return {"spiece_model": self.tokenizer.serialised()}


class LuminaTokenizer(SD1Tokenizer):
    """{"gemma2_2b": one row}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory, tokenizer_data, clip_name="gemma2_2b", name="gemma2_2b", tokenizer=Gemma2Tokenizer
        )


class Gemma2Model(SDClipModel):
    """The last but one layer without the final norm; the attention mask is returned."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, layer="hidden", layer_idx=-2, textmodel_json_config=GEMMA2_2B_CONFIG,
            model_class=LanguageModel, special_tokens={"start": 2, "pad": 0}, layer_norm_hidden_state=False,
            enable_attention_masks=True, return_attention_masks=True,
            model_options={**(model_options or {}), "model_name": "gemma2_2b"},
        )  # fmt: skip


class LuminaModel(SD1ClipModel):
    """{"gemma2_2b": one row} -> features."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, name="gemma2_2b", clip_model=Gemma2Model, model_options=model_options
        )
