"""The text encoders of HunyuanImage 2.1: Qwen2.5-VL 7B, and ByT5 for what is to be written in the picture."""

from __future__ import annotations

import re
from typing import Any

import torch

from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
from comfy.text_encoders.raw_tokenizers import ByT5Tokenizer
from comfy.text_encoders.t5_family import UNLIMITED, T5Model

BYT5_CONFIG = {
    "model_type": "t5", "vocab_size": 1510, "d_model": 1472, "d_kv": 64, "num_heads": 6, "d_ff": 3584, "num_layers": 12,
    "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
}  # fmt: skip
_QUOTED = (r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”")


class ByT5SmallTokenizer(SDTokenizer):
    """Bytes, and an end token."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            "", tokenizer_class=ByT5Tokenizer, pad_with_end=False, embedding_directory=embedding_directory,
            embedding_size=1472, embedding_key="byt5_small", has_start_token=False, pad_to_max_length=False,
            max_length=UNLIMITED, min_length=1, tokenizer_data=tokenizer_data,
        )  # fmt: skip


class ByT5SmallModel(T5Model):
    """ByT5 small with glyphs; padding set to zero."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options, name="byt5_small", config=BYT5_CONFIG,
            zero_out_masked=True,
        )  # fmt: skip


class HunyuanImageTokenizer(QwenImageTokenizer):
    """{"qwen25_7b": one row, "byt5": rows of the prompt's quoted parts, if it has any}."""

    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
    )

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data)
        self.byt5 = ByT5SmallTokenizer(embedding_directory, tokenizer_data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """See `SDTokenizer.tokenize_with_weights`."""
        out = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        quoted = [part for pattern in _QUOTED for part in re.findall(pattern, text)]
        if quoted:
            told = "".join(f'Text "{part}". ' for part in quoted)
            out["byt5"] = self.byt5.tokenize_with_weights(told, return_word_ids)
        return out


class HunyuanImageTEModel(QwenImageTEModel):
    """Features of Qwen, and those of ByT5 as `conditioning_byt5small`."""

    def __init__(
        self, byt5: bool = True, device: Any = "cpu", dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(device=device, dtype=dtype, model_options=model_options, layer="hidden", layer_idx=-3)
        self.byt5_small = ByT5SmallModel(device=device, dtype=dtype, model_options=model_options) if byt5 else None

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(features [1, n, C] of the prompt, None, the rest)."""
        hidden, pooled, extra = super().encode_token_weights(token_weight_pairs)
        if self.byt5_small is not None and "byt5" in token_weight_pairs:
            extra["conditioning_byt5small"] = self.byt5_small.encode_token_weights(token_weight_pairs["byt5"])[0]
        return hidden, pooled, extra

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        super().set_clip_options(options)
        if self.byt5_small is not None:
            self.byt5_small.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        super().reset_clip_options()
        if self.byt5_small is not None:
            self.byt5_small.reset_clip_options()

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        if "encoder.block.0.layer.0.SelfAttention.o.weight" in sd and self.byt5_small is not None:
            return self.byt5_small.load_sd(sd)
        return super().load_sd(sd)


def te(byt5: bool = True) -> type[HunyuanImageTEModel]:
    """`HunyuanImageTEModel` with or without ByT5."""

    class HunyuanImageTEModel_(HunyuanImageTEModel):  # noqa: N801 (ComfyUI's name)
        def __init__(
            self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
        ) -> None:
            super().__init__(byt5=byt5, device=device, dtype=dtype, model_options=model_options)

    return HunyuanImageTEModel_
