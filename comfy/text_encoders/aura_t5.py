"""The text encoder of AuraFlow: T5 1.1 XL trained on the Pile (EleutherAI, pile-t5-xl), with LLaMA's tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDTokenizer
from comfy.text_encoders.sentencepiece import SentencePieceTokenizer
from comfy.text_encoders.t5_family import UNLIMITED, T5Model

PILE_T5_XL_CONFIG = {
    "model_type": "umt5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120,
    "num_layers": 24, "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
}  # fmt: skip


VOCABULARY = "pile_t5xl.model"
_END = 2


class PileTokenizer(SentencePieceTokenizer):
    """Sentence pieces from the weights' file (`spiece_model`), else from the file `VOCABULARY` beside text encoders.

    AuraFlow's own files have no vocabulary, and its licence is not that of this program. Without it the text encoder
    loads, so that the rest of a checkpoint can be used; a prompt is refused.
    """

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        """`path`: the model as bytes or as a uint8 tensor; anything else means that the weights' file has none."""
        if isinstance(path, (bytes, torch.Tensor)):
            return super().from_pretrained(path, **kwargs)
        import folder_paths

        found = folder_paths.get_full_path("text_encoders", VOCABULARY)
        if found is None:
            return _NoVocabulary()
        with open(found, "rb") as file:
            return super().from_pretrained(file.read(), **kwargs)


class _NoVocabulary:
    """In the place of a tokenizer: an empty text is its end token, any other is refused."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        if text:
            self.get_vocab()
        return {"input_ids": [_END]}

    def get_vocab(self) -> dict[str, int]:
        """Raises ValueError: there is none."""
        raise ValueError(
            "AuraFlow's text encoder needs the vocabulary of pile-t5-xl, which does not come with this program; download "
            f"tokenizer.model of EleutherAI/pile-t5-xl and put it into models/text_encoders as {VOCABULARY}"
        )

    def serialised(self) -> None:
        """Nothing."""


class PT5XlTokenizer(SDTokenizer):
    """The Pile's sentence pieces; at least 256 tokens."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            (tokenizer_data or {}).get("spiece_model"), tokenizer_class=PileTokenizer,
            tokenizer_args={"end": _END}, pad_with_end=False,
            embedding_directory=embedding_directory, embedding_size=2048, embedding_key="pile_t5xl",
            has_start_token=False, pad_to_max_length=False, max_length=UNLIMITED, min_length=256, pad_token=1,
            tokenizer_data=tokenizer_data,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The sentence-piece model, if there is one."""
        data = self.tokenizer.serialised()
        return {} if data is None else {"spiece_model": data}


class AuraT5Tokenizer(SD1Tokenizer):
    """{"pile_t5xl": one row of at least 256}."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory, tokenizer_data, clip_name="pile_t5xl", name="pile_t5xl", tokenizer=PT5XlTokenizer
        )


class PT5XlModel(T5Model):
    """Last layer; padding is masked and set to zero."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, name="pile_t5xl", config=PILE_T5_XL_CONFIG,
            special_tokens={"end": _END, "pad": 1}, zero_out_masked=True, model_options=model_options,
        )  # fmt: skip


class AuraT5Model(SD1ClipModel):
    """{"pile_t5xl": one row} -> features."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, name="pile_t5xl", clip_model=PT5XlModel, model_options=model_options
        )
