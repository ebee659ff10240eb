"""Text to ids, without prompt syntax: vocabularies that ship with the program (`tokenizers/<name>/`).

Each class is made by `from_pretrained(folder)` and called with a text; it answers {"input_ids": [...]} with the model's
special tokens, and `get_vocab()`. The `tokenizers` library is imported when the first one is made.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

DATA = os.path.join(os.path.dirname(os.path.realpath(__file__)), "tokenizers")


@functools.cache
def _load(read: Callable[[str], Any], path: str) -> Any:
    return read(path)


class _RawTokenizer:
    """What all have in common; `core` is the library's tokenizer, shared by all that use one folder."""

    def __init__(self, core: Any) -> None:
        self.core = core

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> Any:
        """The tokenizer with the data in folder `path`; raises ValueError when there is none."""
        if not os.path.isdir(path):
            raise ValueError(f"no tokenizer data in {path}: the installation is incomplete, reinstall the program")
        return cls(_load(cls._read, os.path.realpath(path)))

    @staticmethod
    def _read(path: str) -> Any:
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        return self.core.encode(text, add_special_tokens=False).ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids(text)}

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        return self.core.get_vocab()


class CLIPTokenizer(_RawTokenizer):
    """CLIP's byte-level BPE on lower-case text; ids come between start and end tokens."""

    start, end = 49406, 49407

    @staticmethod
    def _read(path: str) -> Any:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        model = models.BPE.from_file(
            os.path.join(path, "vocab.json"), os.path.join(path, "merges.txt"),
            unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="",
        )  # fmt: skip
        core = Tokenizer(model)
        core.normalizer = normalizers.Sequence([
            normalizers.NFC(),
            # Chinese characters are words of their own, control characters nothing, all white space is a space.
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True),
            normalizers.Replace(Regex(r"\s+"), " "),
        ])  # fmt: skip
        words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken("<|startoftext|>"), AddedToken("<|endoftext|>")])
        return core

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.start, *self.ids(text), self.end]}


def _from_json(path: str) -> Any:
    """The tokenizer of `tokenizer.json` in folder `path`, with one id list for each text, as long as it is."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    return core


class T5Tokenizer(_RawTokenizer):
    """T5's unigram model; ids are followed by the end token."""

    end = 1

    _read = staticmethod(_from_json)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*self.ids(text), self.end]}


class BertTokenizer(_RawTokenizer):
    """BERT's word pieces on lower-case text; ids come between [CLS] and [SEP]."""

    start, end = 101, 102

    @staticmethod
    def _read(path: str) -> Any:
        from tokenizers import BertWordPieceTokenizer

        return BertWordPieceTokenizer(os.path.join(path, "vocab.txt"), lowercase=True, strip_accents=True)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.start, *self.ids(text), self.end]}


class OwnVocabulary(_RawTokenizer):
    """A vocabulary that does not come with the program, from a model's own `tokenizer.json`; read when it is needed.

    The file is in folder `path`, or in the folder of that name beside text encoders (models/text_encoders/qwen25).
    """

    def __init__(self, path: str, origin: str, start: int | None) -> None:
        self.path, self.origin = path, origin
        self.before = [] if start is None else [start]

    @classmethod
    def from_pretrained(cls, path: str, origin: str = "", start: int | None = None, **kwargs: Any) -> Any:
        """The tokenizer with `tokenizer.json` in folder `path`; `origin`: the repository that has it."""
        return cls(path, origin, start)

    @property
    def core(self) -> Any:
        """The library's tokenizer. Raises ValueError when there is no file."""
        import folder_paths

        folder = os.path.basename(self.path)
        beside = folder_paths.get_full_path("text_encoders", os.path.join(folder, "tokenizer.json"))
        path = self.path if beside is None else os.path.dirname(beside)
        if not os.path.isfile(os.path.join(path, "tokenizer.json")):
            raise ValueError(
                f"the vocabulary of {self.origin} does not come with the program; put its tokenizer.json into "
                f"models/text_encoders/{folder}"
            )
        return _load(self._read, os.path.realpath(path))

    _read = staticmethod(_from_json)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.before + (self.ids(text) if text else [])}


class ByT5Tokenizer:
    """ByT5's bytes after three special ids; ids are followed by the end token."""

    first, end = 3, 1

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> ByT5Tokenizer:
        """The tokenizer, which has no data."""
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*(byte + self.first for byte in text.encode()), self.end]}

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        return {chr(byte): byte + self.first for byte in range(256)}
