"""Text encoders of Stable Diffusion 3: CLIP-L and bigG side by side, followed by T5-XXL; any of the three may lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.sdxl_clip import CLIP_G_KEY, SDXLClipG, SDXLClipGTokenizer, join_features
from comfy.text_encoders.t5_family import T5XXLModel, T5XXLTokenizer, t5_xxl_detect

__all__ = ["SD3ClipModel", "SD3Tokenizer", "T5XXLModel", "T5XXLTokenizer", "sd3_clip", "t5_xxl_detect"]

_WIDTH = 4096
_POOLED_L, _POOLED_G = 768, 1280


class SD3Tokenizer:
    """{"g": rows, "l": rows, "t5xxl": one row of at least 77}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = tokenizer_data or {}
        make_l = data.get("clip_l_tokenizer_class", SDTokenizer)
        self.clip_l = make_l(embedding_directory=embedding_directory, tokenizer_data=data)
        self.clip_g = SDXLClipGTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)
        self.t5xxl = T5XXLTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See `SDTokenizer.tokenize_with_weights`."""
        parts = {"g": self.clip_g, "l": self.clip_l, "t5xxl": self.t5xxl}
        return {name: part.tokenize_with_weights(text, return_word_ids, **kwargs) for name, part in parts.items()}

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each CLIP pair with the token's text."""
        return self.clip_g.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return {}


class SD3ClipModel(torch.nn.Module):
    """Hidden [1, 77 + L, 4096]: CLIP features padded with zeros, then T5's. Pooled [1, 2048]: both CLIPs'."""

    def __init__(
        self,
        clip_l: bool = True,
        clip_g: bool = True,
        t5: bool = True,
        dtype_t5: torch.dtype | None = None,
        t5_attention_mask: bool = False,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = model_options or {}
        self.dtypes = set()
        self.clip_l = self.clip_g = self.t5xxl = None
        if clip_l:
            make_l = options.get("clip_l_class", SDClipModel)
            self.clip_l = make_l(
                layer="hidden", layer_idx=-2, device=device, dtype=dtype, layer_norm_hidden_state=False,
                return_projected_pooled=False, model_options={**options, "model_name": "clip_l"},
            )  # fmt: skip
            self.dtypes.add(dtype)
        if clip_g:
            self.clip_g = SDXLClipG(device=device, dtype=dtype, model_options=options)
            self.dtypes.add(dtype)
        if t5:
            self.t5xxl = T5XXLModel(
                device=device, dtype=dtype_t5 or dtype, attention_mask=t5_attention_mask, model_options=options
            )
            self.dtypes.add(dtype_t5 or dtype)
        self.t5_attention_mask = t5_attention_mask

    def _encoders(self) -> list[Any]:
        return [encoder for encoder in (self.clip_l, self.clip_g, self.t5xxl) if encoder is not None]

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        for encoder in self._encoders():
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        for encoder in self._encoders():
            encoder.reset_clip_options()

    def _clip_features(self, pairs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(hidden of both CLIPs padded to T5's width or None, pooled of both)."""
        hidden_l = hidden_g = None
        pooled_l, pooled_g = torch.zeros(1, _POOLED_L), torch.zeros(1, _POOLED_G)
        if self.clip_l is not None:
            hidden_l, pooled_l = self.clip_l.encode_token_weights(pairs["l"])[:2]
        if self.clip_g is not None:
            hidden_g, pooled_g = self.clip_g.encode_token_weights(pairs["g"])[:2]
            if hidden_l is None:
                # bigG keeps its place behind the features of the CLIP-L that is not there.
                hidden_g = F.pad(hidden_g, (_POOLED_L, 0))
        pooled = torch.cat([pooled_l.to(pooled_g.device), pooled_g.to(pooled_l.device)], dim=-1)
        present = [hidden for hidden in (hidden_l, hidden_g) if hidden is not None]
        if not present:
            return None, pooled
        hidden = join_features(*present)
        return F.pad(hidden, (0, _WIDTH - hidden.shape[-1])), pooled

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(hidden, pooled[, {"attention_mask"}])."""
        hidden, pooled = self._clip_features(token_weight_pairs)
        extra: dict[str, Any] = {}
        if self.t5xxl is not None:
            t5_hidden, _, *more = self.t5xxl.encode_token_weights(token_weight_pairs["t5xxl"])
            if self.t5_attention_mask and more:
                mask = more[0]["attention_mask"]
                clip_length = 0 if hidden is None else hidden.shape[1]
                extra["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], clip_length), mask], dim=-1)
            hidden = t5_hidden if hidden is None else torch.cat([hidden, t5_hidden], dim=-2)
        if hidden is None:
            hidden = torch.zeros(1, 77, _WIDTH)
        return (hidden, pooled, extra) if extra else (hidden, pooled)

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        encoder: Any
        if CLIP_G_KEY in sd:
            name, encoder = "clip_g", self.clip_g
        elif any(key.startswith("text_model.") for key in sd):
            name, encoder = "clip_l", self.clip_l
        else:
            name, encoder = "t5xxl", self.t5xxl
        if encoder is None:
            raise ValueError(f"these are weights of {name}, which this SD3 text encoder was made without")
        return encoder.load_sd(sd)


def sd3_clip(
    clip_l: bool = True,
    clip_g: bool = True,
    t5: bool = True,
    dtype_t5: torch.dtype | None = None,
    t5xxl_scaled_fp8: torch.dtype | None = None,
    t5_attention_mask: bool = False,
) -> type[SD3ClipModel]:
    """`SD3ClipModel` with the encoders a file has."""

    class SD3ClipModel_(SD3ClipModel):  # noqa: N801 (ComfyUI's name)
        def __init__(
            self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
        ) -> None:
            options = dict(model_options or {})
            if t5xxl_scaled_fp8 is not None:
                options.setdefault("t5xxl_scaled_fp8", t5xxl_scaled_fp8)
            super().__init__(
                clip_l=clip_l, clip_g=clip_g, t5=t5, dtype_t5=dtype_t5, t5_attention_mask=t5_attention_mask,
                device=device, dtype=dtype, model_options=options,
            )  # fmt: skip

    return SD3ClipModel_
