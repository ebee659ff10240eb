"""The text encoders of HunyuanVideo: LLaVA's Llama 3 8B for the tokens, CLIP-L for the pooled vector."""

from __future__ import annotations

import os
from typing import Any

import torch

from comfy.missing import FeatureMissingError
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.text_encoders.llama import LanguageModel
from comfy.text_encoders.qwen_image import cut
from comfy.text_encoders.raw_tokenizers import DATA, OwnVocabulary
from comfy.text_encoders.t5_family import UNLIMITED

LLAMA3_8B_CONFIG = {
    "transformer_type": "llama", "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rms_norm_add": False, "rope_theta": 500000.0, "mlp_activation": "silu", "qkv_bias": False,
}  # fmt: skip
START, PAD, END_OF_TURN, LINES = 128000, 128258, 128009, 271
USER_HEADER = [128006, 882, 128007]  # <|start_header_id|>, "user", <|end_header_id|>
# the prompt format of HunyuanVideo (model card)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: 1. The main "
    "content and theme of the video.2. The color, shape, size, texture, quantity, text, and spatial relationships of the "
    "objects.3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.4. background "
    "environment, light, style and atmosphere.5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)


class LLAMA3Tokenizer(SDTokenizer):
    """Llama 3's byte pairs after a start token; the vocabulary is the user's."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            os.path.join(DATA, "llama3"), tokenizer_class=OwnVocabulary,
            tokenizer_args={"origin": "xtuner/llava-llama-3-8b-v1_1-transformers", "start": START}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=4096, embedding_key="llama", has_end_token=False,
            pad_to_max_length=False, max_length=UNLIMITED, min_length=256, pad_token=PAD, tokenizer_data=tokenizer_data,
        )  # fmt: skip


class HunyuanVideoTokenizer:
    """{"l": rows of 77, "llama": one row}: the prompt in its template."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        self.clip_l = SDTokenizer(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)
        self.llama = LLAMA3Tokenizer(embedding_directory, tokenizer_data)

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, llama_template: str | None = None, image_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """See `SDTokenizer.tokenize_with_weights`. Raises FeatureMissingError for pictures."""
        if image_embeds is not None:
            raise FeatureMissingError(
                "prompts with pictures for HunyuanVideo's text encoder are not in this version; encode the prompt alone"
            )
        whole = (llama_template or TEMPLATE).format(text)
        return {
            "l": self.clip_l.tokenize_with_weights(text, return_word_ids),
            "llama": self.llama.tokenize_with_weights(whole, return_word_ids),
        }

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each CLIP pair with the token's text."""
        return self.clip_l.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return {}


class LLAMAModel(SDClipModel):
    """Llama 3 8B; the last but two layer without the final norm; the attention mask is returned."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, layer="hidden", layer_idx=-3, textmodel_json_config=LLAMA3_8B_CONFIG,
            model_class=LanguageModel, special_tokens={"start": START, "pad": PAD}, layer_norm_hidden_state=False,
            enable_attention_masks=True, return_attention_masks=True,
            model_options={**(model_options or {}), "model_name": "llama"},
        )  # fmt: skip


def prompt_bounds(tokens: list[Any]) -> tuple[int, int | None]:
    """[start, stop) of the user's text: after the header of the user's turn, to the end of the turn, which is kept."""
    ids = [token[0] for token in tokens]
    size = len(USER_HEADER)
    start = next((i + size for i in range(len(ids) - size + 1) if ids[i : i + size] == USER_HEADER), 0)
    if start and ids[start : start + 1] == [LINES]:
        start += 1
    stop = next((i + 1 for i in range(start, len(ids)) if isinstance(ids[i], int) and ids[i] == END_OF_TURN), None)
    return start, stop


class HunyuanVideoClipModel(torch.nn.Module):
    """Features of Llama [1, n, 4096], pooled vector of CLIP-L [1, 768]."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        options = model_options or {}
        self.clip_l = SDClipModel(
            device=device, dtype=dtype, return_projected_pooled=False, model_options={**options, "model_name": "clip_l"}
        )
        self.llama = LLAMAModel(device=device, dtype=dtype, model_options=options)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        self.clip_l.set_clip_options(options)
        self.llama.set_clip_options({name: value for name, value in options.items() if name != "layer"})

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        self.clip_l.reset_clip_options()
        self.llama.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(features of the prompt, CLIP-L's pooled vector, the rest)."""
        row = token_weight_pairs["llama"][0]
        hidden, _, extra = cut(self.llama.encode_token_weights(token_weight_pairs["llama"]), *prompt_bounds(row))
        return hidden, self.clip_l.encode_token_weights(token_weight_pairs["l"])[1], extra

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Give weights to the encoder they belong to."""
        is_clip = any(key.startswith("text_model.") for key in sd)
        return (self.clip_l if is_clip else self.llama).load_sd(sd)
