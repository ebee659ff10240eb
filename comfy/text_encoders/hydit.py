"""Text encoders of HunyuanDiT: a Chinese BERT and mT5-XL."""

from __future__ import annotations

import os
from typing import Any

import torch

from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.text_encoders.bert import BertModel
from comfy.text_encoders.raw_tokenizers import DATA, BertTokenizer
from comfy.text_encoders.sentencepiece import SentencePieceTokenizer
from comfy.text_encoders.t5_family import UNLIMITED, T5Model

BERT_CONFIG = {
    "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24,
    "hidden_act": "gelu", "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    "vocab_size": 47020,
}  # fmt: skip
MT5_XL_CONFIG = {
    "model_type": "mt5", "vocab_size": 250112, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120,
    "num_layers": 24, "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
}  # fmt: skip


class HyditBertTokenizer(SDTokenizer):
    """BERT's word pieces in rows of 77 to 512, padded with 0."""

    def __init__(self, tokenizer_path: Any = None, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            tokenizer_path or os.path.join(DATA, "bert_chinese"), tokenizer_class=BertTokenizer, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=1024, embedding_key="chinese_roberta",
            max_length=512, min_length=77, pad_to_max_length=False, tokenizer_data=tokenizer_data,
        )  # fmt: skip


class MT5XLTokenizer(SDTokenizer):
    """mT5's sentence pieces, whose model comes with the weights as `spiece_model`; at least 256 tokens."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            (tokenizer_data or {}).get("spiece_model"), tokenizer_class=SentencePieceTokenizer,
            tokenizer_args={"end": 1, "origin": "an mT5 file made for ComfyUI"}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=2048, embedding_key="mt5xl",
            has_start_token=False, pad_to_max_length=False, max_length=UNLIMITED, min_length=256,
            tokenizer_data=tokenizer_data,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The sentence-piece model."""
        return {"spiece_model": self.tokenizer.serialised()}


class HyditTokenizer:
    """{"hydit_clip": rows of 77 or more, "mt5xl": one row of at least 256}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = dict(tokenizer_data or {})
        if "mt5xl.spiece_model" in data:
            data["spiece_model"] = data["mt5xl.spiece_model"]
        self.hydit_clip = HyditBertTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)
        self.mt5xl = MT5XLTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See `SDTokenizer.tokenize_with_weights`."""
        return {
            "hydit_clip": self.hydit_clip.tokenize_with_weights(text, return_word_ids, **kwargs),
            "mt5xl": self.mt5xl.tokenize_with_weights(text, return_word_ids, **kwargs),
        }

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each BERT pair with the token's text."""
        return self.hydit_clip.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """The sentence-piece model under mT5's name."""
        return {f"mt5xl.{key}": value for key, value in self.mt5xl.state_dict().items()}


class HyditBertModel(SDClipModel):
    """BERT's last layer, padding masked, mask returned."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, layer="last", textmodel_json_config=BERT_CONFIG, model_class=BertModel,
            special_tokens={"start": 101, "end": 102, "pad": 0}, enable_attention_masks=True,
            return_attention_masks=True, model_options={**(model_options or {}), "model_name": "hydit_clip"},
        )  # fmt: skip


class HyditModel(torch.nn.Module):
    """BERT's features, with mT5's beside them as `conditioning_mt5xl` and both attention masks."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        options = model_options or {}
        self.hydit_clip = HyditBertModel(device=device, dtype=dtype, model_options=options)
        self.mt5xl = T5Model(
            device=device, dtype=dtype, attention_mask=True, name="mt5xl", config=MT5_XL_CONFIG, model_options=options
        )
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        self.hydit_clip.set_clip_options(options)
        self.mt5xl.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        self.hydit_clip.reset_clip_options()
        self.mt5xl.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(BERT's hidden states, None, mT5's features and the masks)."""
        hidden, pooled, bert = self.hydit_clip.encode_token_weights(token_weight_pairs["hydit_clip"])
        mt5_hidden, _, mt5 = self.mt5xl.encode_token_weights(token_weight_pairs["mt5xl"])
        extra = {
            "attention_mask": bert["attention_mask"],
            "conditioning_mt5xl": mt5_hidden,
            "attention_mask_mt5xl": mt5["attention_mask"],
        }
        return hidden, pooled, extra

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        is_bert = "bert.encoder.layer.0.attention.self.query.weight" in sd
        return (self.hydit_clip if is_bert else self.mt5xl).load_sd(sd)
