"""Text encoders of Flux.1: T5-XXL for the tokens, CLIP-L for the pooled vector."""

from __future__ import annotations

from typing import Any

import torch

from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.text_encoders.t5_family import T5XXLModel, T5XXLTokenizer, t5_tokenizer_with, t5_xxl_detect

__all__ = ["FluxClipModel", "FluxTokenizer", "T5XXLModel", "T5XXLTokenizer", "flux_clip", "t5_xxl_detect"]


class FluxTokenizer:
    """{"l": rows of 77, "t5xxl": one row of at least 256}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = tokenizer_data or {}
        make_l = data.get("clip_l_tokenizer_class", SDTokenizer)
        self.clip_l = make_l(embedding_directory=embedding_directory, tokenizer_data=data)
        self.t5xxl = t5_tokenizer_with(min_length=256)(embedding_directory, data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See `SDTokenizer.tokenize_with_weights`."""
        return {
            "l": self.clip_l.tokenize_with_weights(text, return_word_ids, **kwargs),
            "t5xxl": self.t5xxl.tokenize_with_weights(text, return_word_ids, **kwargs),
        }

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each CLIP pair with the token's text."""
        return self.clip_l.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return {}


class FluxClipModel(torch.nn.Module):
    """Features of T5 [1, L, 4096], pooled vector of CLIP-L before its projection [1, 768]."""

    def __init__(
        self,
        dtype_t5: torch.dtype | None = None,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = model_options or {}
        make_l = options.get("clip_l_class", SDClipModel)
        self.clip_l = make_l(
            device=device, dtype=dtype, return_projected_pooled=False, model_options={**options, "model_name": "clip_l"}
        )
        self.t5xxl = T5XXLModel(device=device, dtype=dtype_t5 or dtype, model_options=options)
        self.dtypes = {dtype, dtype_t5 or dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        self.clip_l.set_clip_options(options)
        self.t5xxl.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        self.clip_l.reset_clip_options()
        self.t5xxl.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(T5's hidden states, CLIP-L's pooled vector)."""
        hidden = self.t5xxl.encode_token_weights(token_weight_pairs["t5xxl"])[0]
        pooled = self.clip_l.encode_token_weights(token_weight_pairs["l"])[1]
        return hidden, pooled

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        is_clip = any(key.startswith("text_model.") for key in sd)
        return (self.clip_l if is_clip else self.t5xxl).load_sd(sd)


def flux_clip(dtype_t5: torch.dtype | None = None, t5xxl_scaled_fp8: torch.dtype | None = None) -> type[FluxClipModel]:
    """`FluxClipModel` for a file's T5 weights (see `t5_xxl_detect`)."""

    class FluxClipModel_(FluxClipModel):  # noqa: N801 (ComfyUI's name)
        def __init__(
            self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
        ) -> None:
            options = dict(model_options or {})
            if t5xxl_scaled_fp8 is not None:
                options.setdefault("t5xxl_scaled_fp8", t5xxl_scaled_fp8)
            super().__init__(dtype_t5=dtype_t5, device=device, dtype=dtype, model_options=options)

    return FluxClipModel_
