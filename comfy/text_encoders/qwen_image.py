"""The text encoder of Qwen-Image: Qwen2.5-VL 7B, which is told to describe a picture, or how to change the ones it sees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SDClipModel, SDTokenizer
from comfy.text_encoders.qwen_vl import VISION_7B, QwenVL
from comfy.text_encoders.raw_tokenizers import DATA, OwnVocabulary
from comfy.text_encoders.t5_family import UNLIMITED

QWEN25_7B_CONFIG = {
    "transformer_type": "llama", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rms_norm_add": False, "rope_theta": 1000000.0, "mlp_activation": "silu", "qkv_bias": True,
    "vision": VISION_7B,
}  # fmt: skip
TURN, USER, LINE, PICTURE = 151644, 872, 198, 151655  # <|im_start|>, "user", a line break, <|image_pad|>
# the prompt formats of Qwen-Image and Qwen-Image-Edit (model cards)
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n"
)
PICTURE_WORDS = "<|vision_start|><|image_pad|><|vision_end|>"
# edit with the picture before the words, and with what stands for pictures among the words (2509)
TEMPLATE_IMAGES = EDIT_SYSTEM + "<|im_start|>user\n" + PICTURE_WORDS + "{}<|im_end|>\n<|im_start|>assistant\n"
EDIT_TEMPLATE = EDIT_SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# a text that begins with a turn of its own is taken as it is
_TURNS = ("<|im_start|>", "<|start_header_id|>")


class Qwen25Tokenizer(SDTokenizer):
    """Qwen 2.5's byte pairs, no special tokens around the text; the vocabulary is the user's."""

    def __init__(
        self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(
            os.path.join(DATA, "qwen25"), tokenizer_class=OwnVocabulary,
            tokenizer_args={"origin": "Qwen/Qwen2.5-VL-7B-Instruct"}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=3584, embedding_key="qwen25_7b",
            has_start_token=False, has_end_token=False, pad_to_max_length=False, max_length=UNLIMITED, min_length=1,
            pad_token=151643, tokenizer_data=tokenizer_data, **settings,
        )  # fmt: skip


class QwenImageTokenizer:
    """{"qwen25_7b": one row}: the prompt in its template; prompt weights are text."""

    template, template_images = TEMPLATE, TEMPLATE_IMAGES

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        self.qwen25_7b = Qwen25Tokenizer(embedding_directory, tokenizer_data)

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        llama_template: str | None = None,
        images: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See `SDTokenizer.tokenize_with_weights`.

        images: pictures [n, H, W, 3+] in 0..1, of each of which the first is seen, in the places of <|image_pad|>.
        """
        if not text.startswith(_TURNS):
            template = llama_template or (self.template_images if len(images) else self.template)
            text = template.format(text)
        pictures = iter(images)
        row: list[Any] = []
        for token in self.qwen25_7b.tokenizer(text)["input_ids"]:
            picture = next(pictures, None) if token == PICTURE else None
            if picture is not None:
                token = {"type": "image", "data": picture, "original_type": "image"}
            row.append((token, 1.0, 0) if return_word_ids else (token, 1.0))
        return {"qwen25_7b": [row]}

    def untokenize(self, token_weight_pair: list[Any]) -> list[tuple[Any, str]]:
        """Each pair with the token's text."""
        return self.qwen25_7b.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, Any]:
        """See `SDTokenizer.state_dict`."""
        return {}


class Qwen25Model(SDClipModel):
    """Qwen2.5-VL 7B; the attention mask is returned."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None,
        layer: str = "last", layer_idx: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            device=device, dtype=dtype, layer=layer, layer_idx=layer_idx, textmodel_json_config=QWEN25_7B_CONFIG,
            model_class=QwenVL, special_tokens={"pad": 151643}, layer_norm_hidden_state=False,
            enable_attention_masks=True, return_attention_masks=True,
            model_options={**(model_options or {}), "model_name": "qwen25_7b"},
        )  # fmt: skip


def after_template(tokens: list[Any], turns: int = 2) -> int:
    """Where the prompt begins: at the second turn, after the words that open it."""
    ids = [token[0] for token in tokens]
    starts = [i for i, token in enumerate(ids) if isinstance(token, int) and token == TURN]
    if len(starts) < turns:
        return 0
    start = starts[turns - 1]
    return start + 3 if ids[start + 1 : start + 3] == [USER, LINE] else start


def cut(out: tuple[Any, ...], start: int, stop: int | None = None) -> tuple[Any, ...]:
    """Hidden states and mask of some tokens; a mask that leaves nothing out is dropped."""
    hidden, pooled, extra = out[0][:, start:stop], out[1], dict(out[2])
    mask = extra["attention_mask"][:, start:stop]
    if mask.sum() == mask.numel():
        extra.pop("attention_mask")
    else:
        extra["attention_mask"] = mask
    return hidden, pooled, extra


class QwenImageTEModel(SD1ClipModel):
    """{"qwen25_7b": one row} -> features of the prompt."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            device=device,
            dtype=dtype,
            name="qwen25_7b",
            clip_model=Qwen25Model,
            model_options=model_options,
            **settings,
        )

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(features [1, n, C] of the prompt, None, the rest)."""
        return cut(super().encode_token_weights(token_weight_pairs), after_template(token_weight_pairs["qwen25_7b"][0]))
