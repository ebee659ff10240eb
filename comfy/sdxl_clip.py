"""Text encoders of SDXL, its refiner and Stable Cascade: OpenCLIP bigG alone or beside CLIP-L."""

from __future__ import annotations

from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer

CLIP_G_CONFIG = {
    "num_hidden_layers": 32, "hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120,
    "hidden_act": "gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "vocab_size": 49408,
}  # fmt: skip

# A layer that only bigG is deep enough to have.
CLIP_G_KEY = "text_model.encoder.layers.30.mlp.fc1.weight"


def join_features(*hidden: torch.Tensor) -> torch.Tensor:
    """[1, L, C] of several encoders side by side, at the shortest of their lengths."""
    length = min(part.shape[1] for part in hidden)
    return torch.cat([part[:, :length] for part in hidden], dim=-1)


class SDXLClipG(SDClipModel):
    """OpenCLIP bigG: the last but one layer, without the final norm; padded with 0."""

    def __init__(
        self,
        device: Any = "cpu",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "hidden",
        layer_idx: int | None = None,
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            device=device, max_length=max_length, freeze=freeze, dtype=dtype,
            layer="hidden" if layer == "penultimate" else layer, layer_idx=-2 if layer_idx is None else layer_idx,
            textmodel_json_config=CLIP_G_CONFIG, special_tokens={"start": 49406, "end": 49407, "pad": 0},
            layer_norm_hidden_state=False, return_projected_pooled=True,
            model_options={**(model_options or {}), "model_name": "clip_g"},
        )  # fmt: skip


class SDXLClipGTokenizer(SDTokenizer):
    """CLIP's tokenizer with bigG's padding."""

    def __init__(self, tokenizer_path: Any = None, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            tokenizer_path, pad_with_end=False, embedding_directory=embedding_directory, embedding_size=1280,
            embedding_key="clip_g", tokenizer_data=tokenizer_data,
        )  # fmt: skip


class SDXLTokenizer:
    """Rows for both encoders: {"g": ..., "l": ...}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = tokenizer_data or {}
        make_l = data.get("clip_l_tokenizer_class", SDTokenizer)
        self.clip_l = make_l(embedding_directory=embedding_directory, tokenizer_data=data)
        self.clip_g = SDXLClipGTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See `SDTokenizer.tokenize_with_weights`."""
        return {
            "g": self.clip_g.tokenize_with_weights(text, return_word_ids, **kwargs),
            "l": self.clip_l.tokenize_with_weights(text, return_word_ids, **kwargs),
        }

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each pair with the token's text."""
        return self.clip_g.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return {}


class SDXLClipModel(torch.nn.Module):
    """Features of both encoders side by side [1, L, 2048]; pooled is bigG's [1, 1280]."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        options = model_options or {}
        make_l = options.get("clip_l_class", SDClipModel)
        self.clip_l = make_l(
            layer="hidden", layer_idx=-2, device=device, dtype=dtype, layer_norm_hidden_state=False,
            model_options={**options, "model_name": "clip_l"},
        )  # fmt: skip
        self.clip_g = SDXLClipG(device=device, dtype=dtype, model_options=options)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        self.clip_l.set_clip_options(options)
        self.clip_g.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        self.clip_g.reset_clip_options()
        self.clip_l.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, pooled)."""
        g_hidden, g_pooled = self.clip_g.encode_token_weights(token_weight_pairs["g"])[:2]
        l_hidden = self.clip_l.encode_token_weights(token_weight_pairs["l"])[0]
        return join_features(l_hidden, g_hidden), g_pooled

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        return (self.clip_g if CLIP_G_KEY in sd else self.clip_l).load_sd(sd)


class SDXLRefinerClipModel(SD1ClipModel):
    """bigG alone."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(device=device, dtype=dtype, clip_name="g", clip_model=SDXLClipG, model_options=model_options)


class StableCascadeClipGTokenizer(SDTokenizer):
    """CLIP's tokenizer, padded with the end token."""

    def __init__(self, tokenizer_path: Any = None, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            tokenizer_path, pad_with_end=True, embedding_directory=embedding_directory, embedding_size=1280,
            embedding_key="clip_g", tokenizer_data=tokenizer_data,
        )  # fmt: skip


class StableCascadeTokenizer(SD1Tokenizer):
    """{"g": rows}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data, clip_name="g", tokenizer=StableCascadeClipGTokenizer)


class StableCascadeClipG(SDClipModel):
    """bigG's last layer before the final norm, padding masked."""

    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, layer="hidden", layer_idx=-1, textmodel_json_config=CLIP_G_CONFIG,
            special_tokens={"start": 49406, "end": 49407, "pad": 49407}, layer_norm_hidden_state=False,
            enable_attention_masks=True, return_projected_pooled=True,
            model_options={**(model_options or {}), "model_name": "clip_g"},
        )  # fmt: skip


class StableCascadeClipModel(SD1ClipModel):
    """{"g": rows} -> features."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, clip_name="g", clip_model=StableCascadeClipG, model_options=model_options
        )
