"""Sentence-piece models that come with weights (mT5, umT5, Gemma): read from their bytes, run by `tokenizers`.

The file is one protobuf message (sentencepiece_model.proto): field 1 the pieces (1 text, 2 score, 3 type), field 2 the
trainer's settings (3 model type, 35 byte fallback), field 3 the normaliser's (2 character map, 3 prefix space,
4 remove extra spaces).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch

from comfy.text_encoders.raw_tokenizers import _RawTokenizer

UNIGRAM, BPE = 1, 2
_UNKNOWN_PIECE, _CONTROL_PIECE, _USER_PIECE, _BYTE_PIECE = 2, 3, 4, 6


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: ints, bytes, or floats for 32-bit fields."""
    at = 0
    value: Any
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            raise ValueError(f"unknown protobuf wire type {kind}: the sentence-piece model is damaged")
        yield field, value


class SentencePieceModel:
    """What is in the message."""

    def __init__(self, data: bytes) -> None:
        self.pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normaliser: dict[int, Any] = {}
        for field, value in protobuf_fields(data):
            if field == 1:
                piece = dict(protobuf_fields(value))
                self.pieces.append((piece.get(1, b"").decode(), piece.get(2, 0.0), piece.get(3, 1)))
            elif field == 2:
                trainer = dict(protobuf_fields(value))
            elif field == 3:
                normaliser = dict(protobuf_fields(value))
        self.kind = trainer.get(3, UNIGRAM)
        self.byte_fallback = bool(trainer.get(35, 0))
        self.character_map = normaliser.get(2, b"")
        self.prefix_space = bool(normaliser.get(3, 1))
        self.remove_extra_spaces = bool(normaliser.get(4, 1))
        self.unknown = next((i for i, piece in enumerate(self.pieces) if piece[2] == _UNKNOWN_PIECE), 0)

    def tokenizer(self) -> Any:
        """The `tokenizers` object for it."""
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers

        if self.kind == UNIGRAM:
            vocabulary = [(text, score) for text, score, _ in self.pieces]
            core = Tokenizer(models.Unigram(vocabulary, self.unknown, byte_fallback=self.byte_fallback))
        elif self.kind == BPE:
            core = Tokenizer(self._bpe(models))
        else:
            raise ValueError(f"sentence-piece models of type {self.kind} are not supported; use unigram or BPE")
        steps: list[Any] = []
        if self.character_map:
            steps.append(normalizers.Precompiled(self.character_map))
        if self.remove_extra_spaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        # One space goes before the text, also before spaces it begins with.
        if self.prefix_space:
            steps.append(normalizers.Prepend(" "))
        core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
        special = [text for text, _, kind in self.pieces if kind == _USER_PIECE]
        core.add_tokens([AddedToken(text, normalized=False) for text in special])
        return core

    def _bpe(self, models: Any) -> Any:
        """Merges follow from the vocabulary: a pair merges into any piece that exists, best score first."""
        ids = {text: i for i, (text, _, _) in enumerate(self.pieces)}
        merges = []
        for text, score, kind in self.pieces:
            if kind in (_UNKNOWN_PIECE, _CONTROL_PIECE, _BYTE_PIECE):
                continue
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in ids and right in ids:
                    merges.append((-score, ids[left], ids[right], left, right))
        merges.sort()
        return models.BPE(
            ids, [(left, right) for *_, left, right in merges], unk_token=self.pieces[self.unknown][0], fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )  # fmt: skip


class SentencePieceTokenizer(_RawTokenizer):
    """A raw tokenizer from the bytes of a sentence-piece model; ids between `start` and `end` where given."""

    def __init__(self, data: bytes, start: int | None = None, end: int | None = None) -> None:
        super().__init__(SentencePieceModel(data).tokenizer())
        self.data = data
        self.start, self.end = start, end

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> SentencePieceTokenizer:
        """`path` is the model as bytes or as a uint8 tensor; `origin` says in errors where it should have come from."""
        origin = kwargs.pop("origin", "its text encoder file")
        if not isinstance(path, (bytes, torch.Tensor)):
            raise ValueError(f"the tokenizer comes with the weights as 'spiece_model', which is missing; use {origin}")
        data = path.numpy().tobytes() if isinstance(path, torch.Tensor) else path
        return cls(data, **kwargs)

    def serialised(self) -> torch.Tensor:
        """The model as a uint8 tensor."""
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8)

    def __call__(self, text: str) -> dict[str, list[int]]:
        before = [] if self.start is None else [self.start]
        after = [] if self.end is None else [self.end]
        return {"input_ids": [*before, *self.ids(text), *after]}
